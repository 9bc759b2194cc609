"""`llmjax supervise`: starts a run again when it dies, hangs or was preempted, for as long as it gets on."""

import dataclasses
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmjax import leash
from llmjax.checkpoint import folder as checkpoints
from llmjax.errors import DATA, DONE, IO, NON_FINITE, PEER_LOST, PREEMPTED, USAGE, Refused
from llmjax.train.spent import age

if TYPE_CHECKING:
    from llmjax.mesh import Cluster

FINAL = (DONE, USAGE, DATA, NON_FINITE)  # another start would end in the same way
LONGEST = 300.0  # seconds between two starts, at most
ROOM = 10  # how many times longer it waits where the disk failed, as room is not made in a second
STACKS = 2.0  # seconds that a run which hangs gets to print its stacks
TOO_FEW = ".too_few"  # ending of the file, beside the heartbeat, by which a run says that it found too few devices
RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX", "TPU_WORKER_ID")  # which process this is


@dataclasses.dataclass(frozen=True)
class Options:
    """Starts a run again when it dies, hangs or was preempted, for as long as it gets on."""

    tries: int = 3
    "Starts in a row that come no further, after which it gives up."
    pause: float = 1.0
    "Seconds before the next start; twice as long after each start that came no further, 300 at most."
    hang: float = 600.0
    "Seconds without a sign of life after which a run that has trained a step counts as hung; 0: never."
    hang_start: float = 1800.0
    "The same before its first step, which compiles."
    fallback_mesh: str = ""
    "Mesh to go on with after two starts in a row that came no further as devices or processes were lost."
    fallback: bool = False
    "The same, with the fallback_mesh that the experiment names."


@dataclasses.dataclass(frozen=True)
class Start:
    """What became of one start of the run."""

    code: int  # negative: the signal that ended it
    step: int  # the furthest it came
    seconds: float
    further: bool  # than any start before it
    why: str
    folder: Path | None = None  # run directory
    short: bool = False  # it found fewer devices than its mesh has


def supervise(asked: Options, words: Sequence[str], spare: Sequence[str] = (), module: str = "llmjax.cli") -> int:
    """Runs `python -m module words`, and starts it again until it is done; returns its last code, 128 + n for signal n.

    `spare` are words to add once devices or processes are lost for good; none: it does not fall back. What was
    restarted and why is said on stderr and recorded in the run's events.

    Raises:
      Refused: an option is no number that can be meant.
    """
    check(asked)
    starts: list[Start] = []
    with tempfile.TemporaryDirectory(prefix="llmjax_") as home, leash.Charge() as charge:
        for attempt in itertools.count(1):
            heartbeat = Path(home) / f"{attempt}.json"
            line = [*words, "--supervised.heartbeat", str(heartbeat)]
            starts.append(watch(charge, leash.command(module, line), heartbeat, asked, furthest(starts)))
            last = starts[-1]
            if charge.asked:
                return PREEMPTED if last.code == -charge.asked else shown(last.code)  # it was not even listening yet
            if last.code in FINAL and not (last.short and spare):
                return last.code
            idle = in_vain(starts)
            if spare and lost(idle[-min(2, asked.tries) :], min(2, asked.tries)):
                say("devices or processes are lost: going on with the fall-back mesh.")
                words, spare = [*words, *spare], ()
                starts.append(dataclasses.replace(last, step=furthest(starts), further=True))  # its tries are its own
            elif len(idle) >= asked.tries:
                give_up(idle)
                return shown(last.code)
            seconds = pause(asked.pause, len(idle), last.code)
            # A start may die before it says where its run is.
            folder = next((start.folder for start in reversed(starts) if start.folder), None)
            say(f"start {attempt} {last.why} at step {last.step}: starting again in {seconds:.1f} s{where(folder)}.")
            if folder and first_process(words):
                record(folder, code=last.code, reason=last.why, attempt=attempt)
            if not sleep(seconds, lambda: charge.asked):
                return shown(last.code)


def spare_words(asked: Options, words: Sequence[str], cluster: "Cluster") -> list[str]:
    """What to add to the words of a run to have it go on with a smaller cluster.

    `launch` gets as many processes as have the cluster's devices between them; other launchers keep theirs.

    Raises:
      Refused: no number of launch's processes has as many devices.
    """
    named = ["--fallback-mesh", asked.fallback_mesh] if asked.fallback_mesh else []
    if words[0] == "launch" and cluster.chips:
        each = option(words, "--devices", "4")
        if not each.isdecimal() or not int(each) or cluster.chips % int(each):
            raise Refused(
                f"the fall-back mesh {cluster.name} has {cluster.chips} devices, which processes of {each} "
                "(launch --devices) do not make: choose another --fallback-mesh or --devices."
            )
        named = [*named, "--processes", str(cluster.chips // int(each))]
    return [*named, "--supervised.fallback"]


def check(asked: Options) -> None:
    """Refuses numbers that cannot be meant."""
    if asked.tries < 1:
        raise Refused(f"tries is {asked.tries}: give at least 1.")
    for name in ("pause", "hang", "hang_start"):
        if not getattr(asked, name) >= 0:
            raise Refused(f"{name} is {getattr(asked, name)}: give a number of seconds.")


def watch(charge: leash.Charge, command: Sequence[str], heartbeat: Path, asked: Options, before: int) -> Start:
    """One start, to its end: by itself, or because it hung."""
    began = changed = time.monotonic()
    child, beats = charge.begin(command), Beats(heartbeat)
    why = None
    while child.poll() is None:
        if beats.look():
            changed = time.monotonic()
        limit = asked.hang if beats.trained else asked.hang_start
        if why is None and limit and time.monotonic() - changed > limit:
            why = f"gave no sign of life for {limit:g} s"
            say(f"the run {why}: it shows where it is, and is then ended.")
            charge.show_stacks()
            sleep(STACKS, lambda: child.poll() is not None)
            break
        time.sleep(0.1)
    charge.end()
    beats.look()
    code, short = child.returncode, heartbeat.with_suffix(TOO_FEW).exists()
    why = why or ("found too few devices" if short else ended(code))
    return Start(code, beats.step, time.monotonic() - began, beats.step > before, why, beats.folder, short)


class Beats:
    """What the heartbeat file has said so far."""

    def __init__(self, path: Path):
        self.path, self.step, self.trained = path, 0, False
        self.folder: Path | None = None
        self._seen: tuple[int, int] | None = None

    def look(self) -> bool:
        """Reads the file if it was rewritten; returns whether it was."""
        try:
            status = self.path.stat()
            if (seen := (status.st_mtime_ns, status.st_ino)) == self._seen:
                return False
            said = json.loads(self.path.read_text(encoding="utf-8"))
            self.step, self.folder = max(self.step, int(said["step"])), Path(said["folder"])
            self.trained = self.trained or said["phase"] == "train"
            self._seen = seen
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return True


def furthest(starts: Sequence[Start]) -> int:
    """The largest step that any of them reached."""
    return max((start.step for start in starts), default=0)


def in_vain(starts: Sequence[Start]) -> list[Start]:
    """The last starts in a row that came no further than those before them."""
    idle: list[Start] = []
    for start in reversed(starts):
        if start.further:
            break
        idle.insert(0, start)
    return idle


def lost(idle: Sequence[Start], enough: int) -> bool:
    """Whether so many starts in vain, each for want of devices or processes, show that these do not come back."""
    return len(idle) >= enough and all(start.short or start.code == PEER_LOST or start.code < 0 for start in idle)


def pause(shortest: float, idle: int, code: int) -> float:
    """Seconds to wait, when so many starts in a row were in vain; a little random, so that many do not come at once."""
    seconds = min(LONGEST, shortest * (ROOM if code == IO else 1) * 2.0 ** min(max(idle - 1, 0), 30))
    return seconds * random.uniform(1.0, 1.2)


def ended(code: int) -> str:
    """How a start ended, in words."""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    known = {PREEMPTED: "was preempted", PEER_LOST: "lost another process", IO: "could not write"}
    return known.get(code, f"ended with code {code}")


def where(folder: Path | None) -> str:
    """Where the next start goes on, as a part of a sentence."""
    saved = checkpoints.steps(folder / "checkpoints") if folder else []
    return f", from the checkpoint of step {saved[-1]}" if saved else ""


def give_up(idle: Sequence[Start]) -> None:
    """Reports starts that came no further."""
    say(f"{len(idle)} start{'s' * (len(idle) > 1)} in a row came no further, so it ends here.")
    for start in idle:
        say(f"  a start {start.why} at step {start.step}, after {start.seconds:.1f} s.")


def record(folder: Path, **facts: Any) -> None:
    """Appends a `restart` to the run's events, on the disk before it returns; half a line at their end is taken off.

    A ledger that cannot be written keeps no run from going on.
    """
    line = dict(kind="restart", time=time.time(), elapsed=age(), **facts)
    try:
        with open(folder / "events.jsonl", "a+b") as file:
            file.seek(0)
            content = file.read()
            if not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        say(f"{folder / 'events.jsonl'} cannot be written ({error.strerror}): the restart is not recorded.")


def first_process(words: Sequence[str]) -> bool:
    """Whether the run's first process is in this one's charge: where each has a supervisor, one records for all."""
    detected = next((os.environ[name] for name in RANKS if name in os.environ), "0")
    return option(words, "--processes.index", detected) == "0"


def option(words: Sequence[str], name: str, default: str = "") -> str:
    """The value of an option in a command line, whose last one counts."""
    values = [after for word, after in itertools.pairwise(words) if word == name]
    values += [word.partition("=")[2] for word in words if word.startswith(f"{name}=")]
    return (values or [default])[-1]


def sleep(seconds: float, awake: Callable[[], Any]) -> bool:
    """Waits; returns whether it did to the end, as `awake` was never true."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if awake():
            return False
        time.sleep(min(left, 0.05))
    return not awake()


def shown(code: int) -> int:
    """The exit code by which a parent sees what the child ended with."""
    return code if code >= 0 else 128 - code


def say(text: str) -> None:
    print(f"llmjax supervise: {text}", file=sys.stderr, flush=True)
