"""What the wall time of this process was spent on."""

import os
import time
from collections.abc import Callable

BUCKETS = ("start", "compile", "restore", "save", "data", "evaluate", "steps", "other")


class Spent:
    """Seconds of this process by what they were spent on, on the monotonic clock, from the process's own beginning.

    Where that is unknown they count from here.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, before: float | None = None):
        self._now = now
        self._began = self._marked = now() - (age() if before is None else before)
        self._buckets = dict.fromkeys(BUCKETS, 0.0)

    def elapsed(self) -> float:
        """Seconds since the process began."""
        return self._now() - self._began

    def mark(self, bucket: str) -> float:
        """Counts the time since the last mark, which is returned, for a bucket."""
        return self.mark_split(bucket, bucket, 0.0)

    def mark_split(self, bucket: str, rest: str, seconds: float) -> float:
        """Counts that much of the time since the last mark for a bucket, and for another the rest; returns both."""
        now = self._now()
        passed, self._marked = now - self._marked, now
        part = min(seconds, passed)
        self._buckets[bucket] += part
        self._buckets[rest] += passed - part
        return passed

    def totals(self) -> dict[str, float]:
        """Seconds by bucket, which add up to the time from the beginning to the last mark."""
        return {bucket: round(seconds, 6) for bucket, seconds in self._buckets.items()}


def age() -> float:
    """Seconds since this process began, interpreter and imports included; 0 where the system does not tell."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, AttributeError, IndexError):
        return 0.0
