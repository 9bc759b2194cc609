"""Being asked to stop, by Ctrl-C or SIGTERM, at any time of a run. It imports nothing slow, to be there first."""

import faulthandler
import os
import signal
import sys
from collections.abc import Callable

from llmjax.errors import INTERRUPTED, PREEMPTED


class Notice:
    """Whether this run was asked to stop; a resource, to be used in a `with` from the main thread.

    Until `save_first`, a signal ends the process, with the code that says "start me again". From then on it is noted in
    `asked`, and a second Ctrl-C leaves at once. SIGUSR1 prints the stacks of all threads.
    """

    def __init__(self, say: Callable[[str], None] = print):
        self.say, self.asked = say, False
        self._saves = False
        self._forward: Callable[[], None] | None = None

    def __enter__(self) -> "Notice":
        if hasattr(faulthandler, "register"):
            faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def save_first(self) -> None:
        """There is a state to save now: a signal is noted, and raises nothing."""
        self._saves = True

    def forward(self, call: Callable[[], None]) -> None:
        """Several processes stop together: Ctrl-C calls this, which lets the others know, and SIGTERM is theirs."""
        self._forward = call
        self._before.pop(signal.SIGTERM)
        self._saves = True

    def _handle(self, number: int, frame: object) -> None:
        # An exception from here could arise in any line, of an import or of a destructor too, where it is lost or
        # leaves a lock taken. Leaving like this harms nothing that a kill would not, and what is written stands that.
        if self.asked and number == signal.SIGINT:
            os.write(2, b"\x1b[?25h" * os.isatty(2))  # the cursor, which a bar has hidden
            os._exit(INTERRUPTED)
        if self.asked:
            return
        self.asked = True
        if not self._saves:
            os.write(2, b"llmjax: stopped before there was anything to save: run the same command to continue.\n")
            os._exit(PREEMPTED)
        self.say("Stopping after this step; saving. Press Ctrl-C again to leave at once.")
        if self._forward:
            self._forward()
