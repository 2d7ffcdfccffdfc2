"""How long steps take here, and how many rows one may have before running streams notice."""

from __future__ import annotations

# A running stream may wait this much longer than usual for a newcomer's long prompt; the promise is 2.
STRETCH = 1.9
_NEWEST = 0.2


class StepTimeModel:
    """Seconds of a step by its rows, learnt from the steps there were.

    Steps are grouped by rows in powers of two, each group with its mean rows and seconds, weighted to the newest.
    A group that was never seen is tried once everything smaller is within the limit.
    """

    def __init__(self) -> None:
        self._groups: dict[int, tuple[float, float]] = {}

    def record(self, rows: int, seconds: float) -> None:
        group = rows.bit_length()
        mean_rows, mean_s = self._groups.get(group, (float(rows), seconds))
        self._groups[group] = (
            mean_rows + _NEWEST * (rows - mean_rows),
            mean_s + _NEWEST * (seconds - mean_s),
        )

    def seconds(self, rows: int) -> float | None:
        """What a step of `rows` usually takes, in proportion between the groups around it; None if nothing is known."""
        if not self._groups:
            return None
        below = [entry for entry in self._groups.values() if entry[0] <= rows]
        above = [entry for entry in self._groups.values() if entry[0] > rows]
        if not above or not below:
            return max(below)[1] if below else min(above)[1]
        (low, low_s), (high, high_s) = max(below), min(above)
        return low_s + (high_s - low_s) * (rows - low) / (high - low)

    def most_rows(self, usual_rows: int) -> int | None:
        """Rows of the largest step that takes at most STRETCH times one of `usual_rows`; None if nothing is known."""
        usual_s = self.seconds(usual_rows)
        if usual_s is None:
            return None
        limit_s = STRETCH * usual_s
        within = usual_rows
        for rows, seconds in sorted(self._groups.values()):
            if rows <= usual_rows:
                continue
            if seconds > limit_s:
                low_s = self.seconds(within) or usual_s
                return within + int((rows - within) * (limit_s - low_s) / max(seconds - low_s, 1e-9))
            within = int(rows)
        return 2 * within
