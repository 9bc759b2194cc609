"""`llmjax plan --search` and `--scale`: the best mesh for a run, and how it fares on more and more chips."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn

from llmjax import names
from llmjax.commands.plan_tables import Experiment, command, cut, facts, milliseconds, schedule
from llmjax.errors import Refused
from llmjax.mesh import Cluster
from llmjax.plan import compiled, search, slices
from llmjax.plan.compiled import Report
from llmjax.plan.estimate import Estimate, trusted, type_check
from llmjax.run import Run
from llmjax.train.display import Display, memory

Measure = Callable[[Estimate], float]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search came to."""

    cluster: Cluster
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One mesh of a search."""

    estimate: Estimate
    report: Report | None = None
    measured: float | None = None

    @property
    def compiled(self) -> float | None:
        """Seconds of a step by the compiler's schedule, where there is one."""
        return self.report.time.step if self.report and self.report.time else None

    @property
    def step(self) -> float:
        """Seconds by the model that is trusted for this chip."""
        which, _ = trusted(self.estimate.run.mesh.chip, self.compiled is not None)
        return self.compiled if which == "compiled" else self.estimate.time.step

    @property
    def refused(self) -> bool:
        """Whether the compiler says that it does not fit."""
        return self.report is not None and not self.report.fits


def best_mesh(asked: Experiment, run: Run, options: Any, display: Display, measure: Measure | None) -> Found:
    """Ranks every legal mesh of the run's cluster, compiles or measures the best, and prints them.

    Ctrl-C while it compiles or measures ends that, and what is known by then is shown.

    Raises:
      Refused: no mesh is legal, or none fits.
    """
    began = time.monotonic()
    display.say(f"llmjax plan {run.name}: every mesh of {run.mesh.chips} x {run.mesh.chip.name}")
    ranking = search.ranked(run, run.mesh, options.shown)
    display.say(
        f"{ranking.legal:,} meshes are legal; {ranking.looked:,} had to be looked at in "
        f"{time.monotonic() - began:.1f} s, {ranking.fitting:,} of them fit."
    )
    cases = [Case(each) for each in ranking.best]
    if measure:
        cases = measured(cases, search.usual(run), measure, display)
    elif not options.analytic and run.mesh.chip.platform != "cpu":
        cases = compile_best(cases, options.compile, display)
    cases = in_order(cases)
    table(display, cases)
    winner = cases[0].estimate
    type_check(winner)
    display.say(f"\nThe best: {cut(winner.sizes)}, layout {winner.run.layout.name}{runners_up(cases)}")
    display.say(f"\nNext:\n  {command(asked, winner)}")
    cluster = dataclasses.replace(run.mesh, tensor=winner.sizes.tensor)
    if run.mesh.name not in names.names("meshes") and not options.write:
        display.say(f"  once --write meshes/{cluster.name}.py has written the mesh.")
    return Found(
        cluster, dict(meshes=[facts(asked, c.estimate, c.report, c.measured) for c in cases], legal=ranking.legal)
    )


def in_order(cases: list[Case]) -> list[Case]:
    """The best first: the compiled ones before the others, as two models do not compare, and last what is refused."""
    return sorted(cases, key=lambda case: (case.refused, case.measured or 0, case.compiled is None, case.step))


def compile_best(cases: list[Case], count: int, display: Display) -> list[Case]:
    """The cases with the compiler's report on the first of them."""
    done = list(cases)
    with contextlib.suppress(KeyboardInterrupt), progress(display, "compiling", min(count, len(cases))) as advance:
        for i, case in enumerate(cases[:count]):
            run = dataclasses.replace(case.estimate.run, accumulate=case.estimate.accumulate)
            plans = Path(run.runs) / ".cache" / "plans"
            try:
                report = compiled.report(run, case.estimate.sizes, cache=plans)
            except compiled.NoCompiler as refusal:
                display.say(f"Without the compiler: {refusal}")
                break
            done[i] = dataclasses.replace(case, report=report)
            took = f"{milliseconds(done[i].compiled)} ms/step" if done[i].compiled else "no time without the chip"
            advance(f"{title(case.estimate)}: {'does not fit' if done[i].refused else took}")
    return done


def measured(cases: list[Case], usual: Sequence[Estimate], measure: Measure, display: Display) -> list[Case]:
    """The usual layouts, the slow ones as well, and the best found, all trained for a few steps."""
    known = {(each.run.layout.name, each.sizes): Case(each) for each in usual}
    best = {(c.estimate.run.layout.name, c.estimate.sizes): c for c in cases[:2]}
    every, done = list((known | best).values()), []
    with contextlib.suppress(KeyboardInterrupt), progress(display, "measuring", len(every)) as advance:
        for case in every:
            seconds = measure(case.estimate)
            done.append(dataclasses.replace(case, measured=seconds))
            predicted = milliseconds(case.estimate.time.step)
            advance(f"{title(case.estimate)}: predicted {predicted}, measured {milliseconds(seconds)} ms/step")
    if len(done) > 2:
        predicted, took = [case.estimate.time.step for case in done], [case.measured for case in done]
        display.say(f"Rank correlation of predicted and measured over {len(done)} meshes: "
                    f"{search.rank_correlation(predicted, took):.2f}.")  # fmt: skip
    return done or cases


@contextlib.contextmanager
def progress(display: Display, what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, a line for each step otherwise; yields what to call when one is done."""
    if not display.console.is_terminal:
        done = iter(range(1, total + 1))
        yield lambda line: display.say(f"{what} {next(done)}/{total}  {line}")
        return
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.completed}/{task.total}")
    with Progress(*columns, TextColumn("{task.fields[line]}"), console=display.console, transient=True) as bar:
        task = bar.add_task(what, total=total, line="")
        yield lambda line: bar.update(task, advance=1, line=line)


def title(found: Estimate) -> str:
    """A mesh and its layout in a few words."""
    return f"{cut(found.sizes)}, {found.run.layout.name}{schedule(found.run, found.sizes)}"


def table(display: Display, cases: Sequence[Case]) -> None:
    """The meshes, the best first."""
    which = {"compiled": any(c.compiled for c in cases), "measured": any(c.measured for c in cases)}
    rows = []
    for case in cases:
        found, took = case.estimate, {"compiled": case.compiled, "measured": case.measured}
        held = (case.report or found).memory.total
        rows.append([
            title(found), found.run.remat.policy, str(found.accumulate), memory(held), milliseconds(found.time.step),
            *(milliseconds(took[name]) if took[name] else "" for name in which if which[name]),
            f"{100 * found.mfu[0] * found.time.step / case.step:.1f}%" if found.mfu else "",
            "does not fit" if case.refused else f"{100 * behind(case, cases[0]):+.1f}%",
        ])  # fmt: skip
    extra = [f"{name} ms" for name in which if which[name]]
    columns = ["mesh", "remat", "accumulate", "memory", "analytic ms", *extra, "MFU (C)", "behind"]
    display.say()
    display.table(columns, rows)


def behind(case: Case, best: Case) -> float:
    """By how much of its time a mesh is slower than the best: measured, compiled or analytic, whatever both have."""
    if case.measured and best.measured:
        return case.measured / best.measured - 1
    if case.compiled and best.compiled:
        return case.step / best.step - 1
    return case.estimate.time.step / best.estimate.time.step - 1


def runners_up(cases: Sequence[Case]) -> str:
    """How far the next ones are."""
    rest = [100 * behind(case, cases[0]) for case in cases[1:] if not case.refused]
    if not rest:
        return "; nothing else fits."
    return f"; the next is {rest[0]:.1f}% behind, the last one shown {max(rest):.1f}%."


def scale(asked: Experiment, run: Run, counts: Sequence[int], display: Display) -> dict:
    """Prints the best mesh for each number of chips, the batch growing with them, and returns it.

    Raises:
      Refused: no topology has so many chips, or there is no legal mesh that fits.
    """
    kind = next((name for name, chip in slices.chips().items() if chip == run.mesh.chip), None)
    if kind is None:
        raise Refused(f"mesh is {run.mesh.name}, of which there are no larger ones: scale on a cluster's chips.")
    grown = [larger(run, slices.cluster(kind, count)) for count in counts]
    display.say(f"llmjax plan {run.name}: {run.batch / run.mesh.chips:g} rows per device on more and more of them")
    rows, found = [], []
    with contextlib.suppress(KeyboardInterrupt), progress(display, "searching", len(grown)) as advance:
        for each in grown:
            found.append(search.ranked(each, each.mesh, 1).best[0])
            advance(title(found[-1]))
    for each in found:
        of = f" in {each.run.mesh.slices} slices" if each.run.mesh.slices > 1 else ""
        rows.append([
            f"{each.chips}{of}", f"{each.run.batch:,}", title(each), f"{each.run.remat.policy}, {each.accumulate}",
            milliseconds(each.time.step), f"{each.tokens_per_s:,.0f}", f"{100 * each.mfu[0]:.1f}%",
            f"{100 * each.per_chip / found[0].per_chip:.1f}%",
        ])  # fmt: skip
    columns = ["devices", "batch", "best mesh", "remat, accumulation", "ms/step", "tokens/s", "MFU (C)", "efficiency"]
    display.say()
    display.table(columns, rows)
    return dict(scale=[facts(asked, each) for each in found])


def larger(run: Run, cluster: Cluster) -> Run:
    """The run on another cluster, with as many rows for every device."""
    batch = run.batch * cluster.chips / run.mesh.chips
    if batch != round(batch):
        raise Refused(
            f"scale is {cluster.chips}, to which a batch of {run.batch} on {run.mesh.chips} devices does not grow "
            f"evenly: choose another batch, or other numbers of chips."
        )
    return dataclasses.replace(run, batch=round(batch), mesh=cluster)
