"""A contract against surprises: what a compiled step may send and hold, kept in a file and checked later."""

import collections
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

from llmjax.errors import DATA, IO, Refused
from llmjax.plan.compiled import Report
from llmjax.run import Run

SMALL = 512  # bytes of one collective up to which it is a sum of single numbers, which XLA joins as it likes


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
    "The traced operations; not kept in the file."

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


def of(report: Report, run: Run) -> Contract:
    """The contract that a compiled step keeps to the byte. Sums of single numbers are left out."""
    groups = collections.defaultdict(list)
    for row in report.rows:
        if row.bytes > SMALL * row.count:
            groups[row.kind, row.axes, row.module].append(row)
    terms = []
    for key, rows in sorted(groups.items()):
        sources = tuple(dict.fromkeys(short(source) for row in rows for source in row.sources))
        terms.append(Term(*key, sum(row.count for row in rows), sum(row.bytes for row in rows), sources))
    memory = dict(arguments=report.memory.arguments, temporaries=report.memory.temporaries)
    about = dict(experiment=run.name, mesh=run.mesh.name, layout=run.layout.name, compiler=report.compiler)
    return Contract(tuple(terms), memory, about)


def short(source: str, length: int = 160) -> str:
    """A source without the folders in front of a file of this trainer."""
    shown = re.sub(r" at \S*?((?:llmjax|site-packages)/)", r" at \1", source)
    return shown if len(shown) <= length else f"{shown[: length // 2]} ... {shown[-length // 2 :]}"


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

    Less is no departure. Bytes may grow by the tolerance, a share. Another compiler joins messages of several modules
    in other ways: against a contract of one, the sums over modules are compared.

    Raises:
      Refused: the file holds no contract.
    """
    agreed = read(path)
    same = agreed.about.get("compiler") == contract.about.get("compiler")
    were, now = (each.terms if same else _over_modules(each.terms) for each in (agreed, contract))
    allowed, said = {term.key: term for term in were}, []
    for term in now:
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


def _over_modules(terms: Sequence[Term]) -> list[Term]:
    groups = collections.defaultdict(list)
    for term in terms:
        groups[term.kind, term.axes].append(term)
    return [
        Term(*key, "all modules", sum(t.count for t in same), sum(t.bytes for t in same), same[0].sources)
        for key, same in groups.items()
    ]
