"""What a user can get wrong, said in one sentence, and the exit codes a scheduler can act on."""

import difflib
from collections.abc import Iterable

DONE = 0
UNEQUAL = 1  # `llmjax parity` found numbers that differ
USAGE = 2  # a usage error or an impossible config
DATA = 65  # data or a checkpoint is invalid
NON_FINITE = 70  # training diverged and was stopped
IO = 74  # the disk or the network failed
PREEMPTED = 75  # saved; start me again
PEER_LOST = 76  # another process of this run is gone
INTERRUPTED = 130  # by Ctrl-C, with nothing saved


class Refused(Exception):
    """A run that cannot be done as asked.

    The message is one sentence that names the field or file, its value and the remedy. The command line
    prints it without a traceback and exits with `code`.
    """

    def __init__(self, message: str, code: int = USAGE):
        super().__init__(message)
        self.code = code


class TooFewDevices(Refused):
    """Some of the devices of the mesh are not there: gone, maybe, and a supervisor may know a smaller mesh."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The beginning of a remedy, "did you mean cpu8? ", or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]}? " if near else ""
