"""Predicts how long a step takes from its number of rows, to bound the delay that a long prompt causes."""

from __future__ import annotations

# A step with a chunk of a long prompt may take this many times as long as one without it. The documented bound is 2.
MAX_SLOWDOWN = 1.9
# A step hangs if it takes this many times as long as expected: other programs can take most of the processor.
_HANG_FACTOR = 5
_FIRST_STEP_S = 60.0
_LONGEST_STEP_S = 600.0
# Weight of the newest step in the moving averages.
_NEWEST = 0.2


class StepTimeModel:
    """Learns the seconds of a step by its rows from the steps that ran.

    Steps are grouped by rows in powers of two. Each group has moving averages of rows and seconds. A group without
    steps is tried once all smaller groups are within the limit.
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

    def predict(self, rows: int) -> float | None:
        """Seconds of a step of `rows`, interpolated linearly between groups; None before the first record."""
        if not self._groups:
            return None
        below = [entry for entry in self._groups.values() if entry[0] <= rows]
        above = [entry for entry in self._groups.values() if entry[0] > rows]
        if not above or not below:
            return max(below)[1] if below else min(above)[1]
        (low, low_s), (high, high_s) = max(below), min(above)
        return low_s + (high_s - low_s) * (rows - low) / (high - low)

    def limit(self, rows: int, least_s: float) -> float:
        """Seconds after which a step of `rows` has hung: at least `least_s`. May be called from another thread.

        A step may take _HANG_FACTOR times as long as predicted, which for more rows than any step before grows with the
        rows. The first step may take longer, because it can read weights from a disk.
        """
        groups = list(self._groups.values())
        if not groups:
            return max(least_s, _FIRST_STEP_S)
        most_rows, most_s = max(groups)
        expected_s = most_s * max(1.0, rows / most_rows) if rows > 0 else 0.0
        return max(least_s, min(_HANG_FACTOR * expected_s, _LONGEST_STEP_S))

    def max_rows(self, usual_rows: int) -> int | None:
        """The most rows that take at most MAX_SLOWDOWN times as long as `usual_rows`; None before the first record."""
        usual_s = self.predict(usual_rows)
        if usual_s is None:
            return None
        limit_s = MAX_SLOWDOWN * usual_s
        within = usual_rows
        for rows, seconds in sorted(self._groups.values()):
            if rows <= usual_rows:
                continue
            if seconds > limit_s:
                low_s = self.predict(within) or usual_s
                return within + int((rows - within) * (limit_s - low_s) / max(seconds - low_s, 1e-9))
            within = int(rows)
        return 2 * within
