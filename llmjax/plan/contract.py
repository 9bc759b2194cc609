"""A contract against surprises: what a compiled step may send and hold, kept in a file and checked later."""

import collections
import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

from llmjax import mesh as meshes
from llmjax.errors import DATA, IO, Refused
from llmjax.mesh import Axes
from llmjax.plan.collectives import SCALAR, Collective, collectives
from llmjax.plan.compiled import Report
from llmjax.run import Run
from llmjax.train.program import make

# What tells a module from the traced operation a collective comes from; the first that is found counts.
MODULES = (
    ("attention", r"/attention/|ring\.py"),
    ("mlp", r"/mlp/|/experts/|moe\.py"),
    ("head", r"BTD,VD->BTV|BTV,VD->BTD|BTD,BTV->VD"),
    ("embedding", r"/gather|/scatter-add"),
    ("loss", r"loss\.py"),
    ("pipeline", r"pipeline\.py"),
    ("norm", r"/block/"),
    ("optimizer", r"optax|optim|step\.py"),
)


@dataclasses.dataclass(frozen=True)
class Term:
    """What a step may send of one kind, over some axes, for some modules."""

    kind: str
    axes: tuple[str, ...]
    module: str
    count: int
    "Collectives in a step."
    bytes: int
    "Payload in a step."
    sources: tuple[str, ...] = ()
    "The traced operations, most bytes first; not kept in the file."

    @property
    def key(self) -> tuple[str, tuple[str, ...], str]:
        return self.kind, self.axes, self.module

    def __str__(self):
        return f"{self.kind} over {' x '.join(self.axes) or '?'} for {self.module}"


@dataclasses.dataclass(frozen=True)
class Contract:
    """What a compiled step sends and holds."""

    terms: tuple[Term, ...]
    memory: dict[str, int]
    "Bytes of a device, by class."
    about: dict[str, str] = dataclasses.field(default_factory=dict)
    "What was compiled, for a reader."


def of(found: Iterable[Collective], memory: dict[str, int], about: dict[str, str] | None = None) -> Contract:
    """The contract that a program with these collectives fulfils to the byte. Sums of single numbers are left out."""
    groups = collections.defaultdict(list)
    for x in found:
        if size := x.count * sum(array.bytes for array in x.arrays if array.bytes > SCALAR):
            groups[x.kind, x.axes, module(x.source)].append((size, x.count, short(x.source)))
    terms = []
    for (kind, axes, name), those in sorted(groups.items()):
        sizes, counts, sources = zip(*sorted(those, reverse=True), strict=True)
        terms.append(Term(kind, axes, name, sum(counts), sum(sizes), tuple(dict.fromkeys(sources))))
    return Contract(tuple(terms), memory, about or {})


def module(source: str) -> str:
    """The parts of the model that an operation belongs to, joined by + where XLA combined several."""
    combined = re.search(r"\((.*:.*)\)", source.partition(" at ")[0])
    around = source.replace(combined[0], "") if combined else source
    parts = [f"{around.partition(' at ')[0]}/{part}" for part in combined[1].split(":")] if combined else [source]
    found = [next((name for name, words in MODULES if re.search(words, part)), "") for part in parts]
    known = {name for name in found if name}
    return "+".join(sorted(known - {"norm"} or known)) or "other"


def short(source: str, length: int = 160) -> str:
    """A source without the folders in front of a file of this trainer."""
    shown = re.sub(r" at \S*?((?:llmjax|site-packages)/)", r" at \1", source)
    return shown if len(shown) <= length else f"{shown[: length // 2]} ... {shown[-length // 2 :]}"


def emulated(run: Run, sizes: Axes, devices: Sequence[jax.Device]) -> Contract:
    """The contract of a run's step compiled for devices that this machine has or emulates."""
    program = make(run, meshes.device_mesh(sizes, list(devices), run.mesh.slices), run.mesh.chip)
    with program.context():
        step = program.step.lower(program.abstract_state(), program.abstract_batch()).compile()
    held = step.memory_analysis()
    memory = dict(
        arguments=held.argument_size_in_bytes, temporaries=held.temp_size_in_bytes,
        results=held.output_size_in_bytes - held.alias_size_in_bytes,
    )  # fmt: skip
    return of(collectives(step, program.mesh), memory, about(run))


def of_report(report: Report, run: Run) -> Contract:
    """The contract of a step that was compiled for devices this machine does not have."""
    groups = collections.defaultdict(list)
    for row in report.communication:
        groups[row.kind, row.axes, row.module].append(row)
    terms = [
        Term(*key, sum(int(row.count) for row in rows), sum(int(row.bytes) for row in rows))
        for key, rows in sorted(groups.items())
    ]
    memory = {field.name: int(getattr(report.memory, field.name)) for field in dataclasses.fields(report.memory)}
    return Contract(tuple(terms), memory, about(run))


def about(run: Run) -> dict[str, str]:
    """What was compiled, and with what."""
    return dict(experiment=run.name, mesh=run.mesh.name, layout=run.layout.name, jax=jax.__version__)


def write(path: Path, contract: Contract) -> None:
    """Keeps a contract.

    Raises:
      Refused: the file cannot be written.
    """
    terms = [{k: v for k, v in dataclasses.asdict(term).items() if k != "sources"} for term in contract.terms]
    facts = dict(about=contract.about, memory=contract.memory, terms=terms)
    try:
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise Refused(f"write_contract is {path}, which cannot be written ({error.strerror}): choose another file.",
                      IO) from error  # fmt: skip


def read(path: Path) -> Contract:
    """The contract that a file holds.

    Raises:
      Refused: there is no such file, or it holds none.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        terms = tuple(Term(**term | {"axes": tuple(term["axes"])}) for term in facts["terms"])
        return Contract(terms, {name: int(size) for name, size in facts["memory"].items()}, facts["about"])
    except OSError as error:
        raise Refused(f"check is {path}, which cannot be read ({error.strerror}): write it with --write-contract.",
                      DATA) from error  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"check is {path}, which holds no contract ({error}): write it anew with --write-contract.",
                      DATA) from error  # fmt: skip


def check(path: Path, contract: Contract, tolerance: float = 0.05) -> list[str]:
    """How a program breaks the contract in a file, a sentence for each: what it sends anew, or more of than before.

    Less is no departure. Bytes may grow by the tolerance, a share.

    Raises:
      Refused: the file holds no contract.
    """
    agreed = read(path)
    allowed, said = {term.key: term for term in agreed.terms}, []
    for term in contract.terms:
        before = allowed.get(term.key)
        source = f"; from {term.sources[0]}" if term.sources else ""
        if before is None:
            said.append(f"{term}: {term.count:,} runs of {term.bytes:,} bytes in a step are new{source}")
        elif term.bytes > before.bytes * (1 + tolerance):
            more = 100 * (term.bytes / before.bytes - 1)
            said.append(f"{term}: {term.bytes:,} bytes in a step, {more:.0f}% more than {before.bytes:,}{source}")
    for name, size in contract.memory.items():
        if (before := agreed.memory.get(name)) is not None and size > before * (1 + tolerance):
            more = f", {100 * (size / before - 1):.0f}%" if before else ""
            said.append(f"memory for {name}: {size:,} bytes on a device{more} more than {before:,}")
    return said
