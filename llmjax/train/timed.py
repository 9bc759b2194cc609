"""Saving by the clock, at a step that all processes agree on."""

import time
from collections.abc import Callable

from llmjax import processes


class Timed:
    """Says when a checkpoint is due because so many seconds have passed since the last one; 0: never.

    Clocks differ between processes, so the first one decides. They look at its clock only at steps agreed on the time
    before: each time after half of the steps that seem to be left, so a look costs nothing worth measuring.
    """

    def __init__(self, seconds: float, start: int, now: Callable[[], float] = time.monotonic):
        self.seconds, self.now = seconds, now
        self.saved(start)

    def saved(self, step: int) -> None:
        """A checkpoint of this step was started."""
        self.since, self.step, self.next = self.now(), step, step + 1

    def looks(self, step: int) -> bool:
        """Whether the processes look at the clock after this step; the device must be idle then."""
        return self.seconds > 0 and step >= self.next

    def due(self, step: int) -> bool:
        """Whether to save after this step; the same on every process."""
        if not self.looks(step):
            return False
        steps = processes.agree(self._steps_left(step))
        self.next = step + max(1, steps)
        return steps == 0

    def _steps_left(self, step: int) -> int:
        """Half the steps until the next checkpoint, as far as this process can tell; 0: it is due."""
        passed = self.now() - self.since
        if passed >= self.seconds:
            return 0
        return max(1, min(10_000, int((self.seconds - passed) / max(passed, 1e-3) * (step - self.step) / 2)))
