from __future__ import annotations

from serve_app.telemetry.span_clock import SpanClock

HOUR_NS = 3600 * 10**9


def test_a_step_of_the_wall_clock_does_not_change_a_duration() -> None:
    wall, monotonic = 10**18, 5 * 10**9
    clock = SpanClock(lambda: wall, lambda: monotonic)
    for step in (-HOUR_NS, HOUR_NS):
        wall += step
        monotonic += 20
        assert clock.now() - clock.began == monotonic - 5 * 10**9


def test_the_instants_are_those_of_the_wall_clock() -> None:
    clock = SpanClock()
    assert 0 <= SpanClock().began - clock.began <= 10**9
    assert 0 <= clock.now() - clock.began <= 10**9
