"""What callers want of the service, by the rules of serve_app/gateway/workload.py, whose class needs an event loop."""

from __future__ import annotations

from collections.abc import Iterable

from perf.simulate.replica import Replica, Request
from serve_app.core.scaling import Demand, RecentRate

# As in serve_app/gateway/workload.py.
_USUAL_ANSWER = 128.0
_SMOOTHING = 0.05


class Workload:
    """Knows the open requests. The length of an answer is expected to be the mean of those that have ended."""

    def __init__(self) -> None:
        self._expected: dict[int, float] = {}
        self._waiting: dict[int, float] = {}  # tokens to compute, by request
        self._answer = _USUAL_ANSWER
        self._per_estimate = 1.0
        self._prompts, self._answers = RecentRate(), RecentRate()

    def __len__(self) -> int:
        return len(self._expected)

    @property
    def waiting(self) -> int:
        """Requests without a first token."""
        return len(self._waiting)

    def arrived(self, request: Request, now: float) -> None:
        self._expected[request.number] = self._answer
        self._waiting[request.number] = tokens = request.prompt * self._per_estimate
        self._prompts.add(tokens, now)
        self._answers.add(self._answer, now)

    def began(self, request: Request) -> None:
        """The request has its first token."""
        del self._waiting[request.number]
        computed = (request.prompt - request.cached) / request.prompt
        self._per_estimate += _SMOOTHING * (computed - self._per_estimate)

    def ended(self, request: Request) -> None:
        del self._expected[request.number]
        self._waiting.pop(request.number, None)
        if not request.error:
            self._answer += _SMOOTHING * (request.answer - self._answer)

    def demand(self, replicas: Iterable[Replica], now: float) -> Demand:
        expected = self._expected
        answers, running = 0.0, 0
        for replica in replicas:
            replica.advance(now)
            for finish, number, request in replica.decoding:
                running += 1
                answers += max(1.0, expected[number] - replica.generated(finish, request.answer))
        # Those that have no first token, and those that are computed again after a loss.
        answers += sum(expected[number] for number in self._waiting)
        return Demand(
            len(expected) - len(self._waiting),
            len(self._waiting),
            sum(self._waiting.values()),
            answers,
            self._prompts.value(now),
            self._answers.value(now),
        )
