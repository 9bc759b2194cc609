"""What the steps of a trace were spent on: reads XProf's own files, of CPUs, TPUs and GPUs, without a viewer."""

import collections
import dataclasses
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from llmjax.errors import DATA, Refused

Kind = Literal["compute", "collectives", "memory"]
KINDS: tuple[Kind, ...] = ("compute", "collectives", "memory")  # where several run at once, the first one counts
COLLECTIVE = re.compile(
    r"all-?_?reduce|all-?_?gather|reduce-?_?scatter|all-?_?to-?_?all|collective|nccl|ragged-all|^(send|recv)(-done)?[.\d]*$"
    r"|sendrecv|barrier",
    re.IGNORECASE,
)
# An operation made of nothing but these moves numbers about and computes none.
MOVES = frozenset(("copy", "transpose", "bitcast", "broadcast", "convert", "concatenate", "pad", "slice", "dynamic",
                   "update", "gather", "scatter", "reshape", "iota", "reverse", "memset", "infeed", "outfeed", "data",
                   "formatting", "host", "transfer"))  # fmt: skip
AROUND = frozenset(("fusion", "wrapped", "fused", "computation", "loop", "input", "start", "done", "async"))
HOLDER = re.compile(r"^(while|conditional|call|async-call|fused_computation_call|cond|body)([-_.\d]|$)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Op:
    """One run of an operation on a device, in nanoseconds of the trace."""

    device: str
    name: str
    kind: Kind
    begin: float
    end: float
    source: str = ""
    "The traced operation it comes from, where the trace says so."


@dataclasses.dataclass(frozen=True)
class Top:
    """An operation over all steps and devices."""

    name: str
    kind: Kind
    runs: int
    seconds: float
    "Of all its runs on all devices."
    share: float
    "Of the time of all operations."
    source: str


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a trace says."""

    devices: int
    steps: tuple[int, ...]
    "Numbers of the traced steps; none where the trace has no such marks."
    seconds: float
    "From the first operation to the last."
    shares: dict[str, float]
    "Of that time, mean over devices: compute, collectives that no compute hides, memory, idle; they add up to 1."
    hidden: float | None
    "The part of the time of collectives that compute hides; None where there are none."
    top: tuple[Top, ...]


def newest(folder: Path) -> list[Path]:
    """The files of the newest trace of a run directory, one per process.

    Raises:
      Refused: there is none.
    """
    sessions = sorted((folder / "profile" / "plugins" / "profile").glob("*/"))
    files = [sorted(session.glob("*.xplane.pb")) for session in sessions]
    found = next((each for each in reversed(files) if each), None)
    if found is None:
        raise Refused(
            f"{folder} has no profile: make one with llmjax train and --profile.start 20 --profile.steps 5.", DATA
        )
    return found


def read(files: Sequence[Path], top: int = 15) -> Profile:
    """The profile that these files hold.

    Raises:
      Refused: one of them is torn, or none has an operation of a device in it.
    """
    from jax.profiler import ProfileData

    ops, steps = [], set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, of a type that jaxlib makes
        for path in files:
            try:
                planes = list(ProfileData.from_file(str(path)).planes)
            except (RuntimeError, ValueError, OSError) as error:
                why = f"{path} is no whole trace ({error}): make another with --profile.steps 5."
                raise Refused(why, DATA) from error
            ops += [op for plane in planes for op in operations(plane, path.name.removesuffix(".xplane.pb"))]
            steps |= {number for plane in planes for number in numbers(plane)}
    if not ops:
        raise Refused(f"{files[0]} holds no operation of a device: make another with --profile.steps 5.", DATA)
    return summed(ops, steps, top)


def operations(plane: Any, host: str) -> Iterator[Op]:
    """The operations of a plane of XProf: a device's, or those that a CPU's threads ran for devices."""
    on_device = re.match(r"/device:(TPU|GPU|CUSTOM)", plane.name)
    if not on_device and not plane.name.startswith("/host:CPU"):
        return
    lines = list(plane.lines)
    if any(line.name == "XLA Ops" for line in lines):  # a TPU: other lines say the same by module or by step
        lines = [line for line in lines if line.name in ("XLA Ops", "Async XLA Ops")]
    elif on_device:  # a GPU: its streams
        lines = [line for line in lines if line.name.startswith("Stream")]
    for line in lines:
        for event in line.events:
            stats = dict(event.stats)
            if event.duration_ns <= 0 or not (on_device or "hlo_op" in stats):
                continue
            name, category = name_of(event.name, stats), str(stats.get("hlo_category", ""))
            if HOLDER.match(name) or category in ("while", "conditional", "call"):
                continue
            device = f"{host}{plane.name}" if on_device else f"{host}/cpu:{stats.get('device_ordinal', 0)}"
            begin = float(event.start_ns)
            source = str(stats.get("tf_op") or "")
            yield Op(device, name, kind_of(name, category), begin, begin + float(event.duration_ns), source)


def name_of(shown: str, stats: dict[str, Any]) -> str:
    """The name of an operation: XLA's, or the kernel's."""
    told = re.match(r"%?([\w.-]+) = ", shown)
    return str(stats.get("hlo_op") or (told[1] if told else shown))


def kind_of(name: str, category: str = "") -> Kind:
    """What an operation does. Fusions count as compute, whether memory or arithmetic bounds them."""
    for word in (category, name):
        if COLLECTIVE.search(word):
            return "collectives"
    return "memory" if any(_moves(word) for word in (category, name)) else "compute"


def _moves(name: str) -> bool:
    words = {word for word in re.split(r"[\W_\d]+", name.lower()) if word} - AROUND
    return name.lower().startswith("memcpy") or (bool(words) and words <= MOVES)


def numbers(plane: Any) -> Iterator[int]:
    """The steps that a host's marks name."""
    if plane.name.startswith("/host:"):
        for line in plane.lines:
            for event in line.events:
                if event.name == "train":
                    yield from (int(value) for key, value in event.stats if key == "step_num")


def summed(ops: Sequence[Op], steps: Iterable[int], top: int) -> Profile:
    """The profile of these operations."""
    begin, end = min(op.begin for op in ops), max(op.end for op in ops)
    by_device: dict[str, list[Op]] = collections.defaultdict(list)
    for op in ops:
        by_device[op.device].append(op)
    each = [swept(own) for own in by_device.values()]
    wall = (end - begin) * len(each)
    shares = {kind: sum(times[kind] for times in each) / wall for kind in KINDS}
    shares["idle"] = max(0.0, 1 - sum(shares.values()))
    travelled = sum(length(op for op in own if op.kind == "collectives") for own in by_device.values())
    waited = sum(times["collectives"] for times in each)
    hidden = 1 - waited / travelled if travelled else None
    return Profile(len(each), tuple(sorted(steps)), (end - begin) / 1e9, shares, hidden, tuple(ranked(ops, top)))


def swept(ops: Sequence[Op]) -> dict[Kind, float]:
    """Nanoseconds of one device by kind; of what runs at once the first of `KINDS` counts."""
    changes: dict[float, collections.Counter] = collections.defaultdict(collections.Counter)
    for op in ops:
        changes[op.begin][op.kind] += 1
        changes[op.end][op.kind] -= 1
    found: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
    running: collections.Counter = collections.Counter()
    before = 0.0
    for now in sorted(changes):
        if counts := next((kind for kind in KINDS if running[kind] > 0), None):
            found[counts] += now - before
        for kind, change in changes[now].items():
            running[kind] += change
        before = now
    return found


def length(ops: Iterable[Op]) -> float:
    """Nanoseconds in which any of them runs."""
    total, until = 0.0, float("-inf")
    for op in sorted(ops, key=lambda op: op.begin):
        total += max(0.0, op.end - max(op.begin, until))
        until = max(until, op.end)
    return total


def ranked(ops: Sequence[Op], top: int) -> list[Top]:
    """The operations that take longest."""
    sums: dict[str, list[Op]] = collections.defaultdict(list)
    for op in ops:
        sums[op.name].append(op)
    total = sum(op.end - op.begin for op in ops)
    found = []
    for name, runs in sums.items():
        took = sum(op.end - op.begin for op in runs)
        found.append(Top(name, runs[0].kind, len(runs), took / 1e9, took / total, runs[0].source))
    return sorted(found, key=lambda one: -one.seconds)[:top]
