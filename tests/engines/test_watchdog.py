from __future__ import annotations

import subprocess
import sys
import threading
from itertools import count

import pytest

from serve_app.engines import watchdog
from serve_app.engines.protocol import Work
from serve_app.engines.watchdog import Progress, Watchdog, stacks
from tests.engines.native.helpers import wait_until


def hang_time(progress: Progress, work: Work | None, seconds: list[float]) -> float | None:
    """The first of the instants at which the work hangs."""
    return next((now for now in seconds if progress.hangs(work, now)), None)


def test_work_hangs_when_it_was_in_progress_for_longer_than_its_limit() -> None:
    assert hang_time(Progress(), Work(1, 10), [n / 2 for n in range(100)]) == 10.5


def test_work_that_advances_does_not_hang() -> None:
    progress = Progress()
    assert not any(progress.hangs(Work(number // 19, 10), number / 2) for number in range(1000))
    assert not any(progress.hangs(None if number % 20 == 0 else Work(99, 10), number / 2) for number in range(1000))


def test_the_limit_of_the_current_work_counts() -> None:
    progress = Progress()
    assert not progress.hangs(Work(1, 60), 0.0)
    assert hang_time(progress, Work(1, 2), [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]) == 2.5


def test_the_time_in_which_the_process_stood_still_does_not_count() -> None:
    """After SIGSTOP and SIGCONT, or a pause of the machine, the threads continue after a long time."""
    progress = Progress()
    assert not progress.hangs(Work(1, 10), 0.0)
    assert not progress.hangs(Work(1, 10), 3600.0)
    assert hang_time(progress, Work(1, 10), [3600.5 + n / 2 for n in range(100)]) == 3609.5


def test_on_hang_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_TICK_S", 0.01)
    calls: list[str] = []
    dog = Watchdog(lambda: Work(1, 0.05), calls.append)
    dog.start()
    wait_until(lambda: bool(calls))
    dog.stop()
    assert calls == ["the engine made no progress for more than 0 s"]


def test_work_of_an_idle_or_busy_engine_calls_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_TICK_S", 0.001)
    numbers, calls, asked = count(), list[str](), threading.Event()

    def work() -> Work | None:
        number = next(numbers)
        if number > 200:
            asked.set()
        return Work(number, 0.0) if number % 2 else None

    dog = Watchdog(work, calls.append)
    dog.start()
    assert asked.wait(10)
    dog.stop()
    dog.stop()
    assert calls == []


HOLDS_THE_LOCK = """
import ctypes, time
from serve_app.engines.watchdog import Watchdog
Watchdog(lambda: None, print, lock_timeout_s=1).start()
time.sleep(1.5)
print("alive", flush=True)
ctypes.PyDLL(None).sleep(30)
print("not reached", flush=True)
"""


def test_a_process_whose_interpreter_lock_is_held_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLDS_THE_LOCK], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 1
    assert done.stdout == "alive\n", "the process lives while the lock is free"
    assert "Timeout (0:00:01)!" in done.stderr
    assert 'File "<string>", line 7' in done.stderr, "the stack of the thread that holds the lock"


def test_the_stacks_name_each_thread_and_its_function() -> None:
    entered, leave = threading.Event(), threading.Event()

    def hangs() -> None:
        entered.set()
        leave.wait()

    thread = threading.Thread(target=hangs, name="engine")
    thread.start()
    entered.wait()
    text = stacks()
    leave.set()
    thread.join()
    assert "Thread engine:" in text
    assert "in hangs" in text
    assert "Thread MainThread:" in text
