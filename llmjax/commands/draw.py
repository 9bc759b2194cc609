"""`llmjax draw`: a page with a run's mesh, where its arrays live, and what happens in a step."""

import dataclasses
from pathlib import Path

from llmjax import processes as system
from llmjax.commands.plan import plans
from llmjax.commands.show import check_file, on_mesh
from llmjax.errors import DONE, IO, Refused
from llmjax.mesh import Axes
from llmjax.plan import compiled, places, timeline
from llmjax.plan.estimate import Estimate, communication, estimate
from llmjax.plan.topology import NoCompiler
from llmjax.processes import Processes
from llmjax.report.drawing import Drawing, facts, html
from llmjax.run import Run
from llmjax.train.display import Display, memory
from llmjax.train.program import Program


@dataclasses.dataclass(frozen=True)
class Options:
    """What is drawn, and where to."""

    out: str = ""
    "HTML file to write; NAME_on_MESH.html if empty."
    compiled: bool = False
    "Compile the step for TPUs: the timeline is the compiler's, and chips lie where JAX puts them."


def draw(run: Run, processes: Processes, options: Options, display: Display | None = None) -> int:
    """Writes the page; returns an exit code. Devices are looked for only where the mesh leaves them open.

    Raises:
      Refused: the run's shapes cannot be cut over its mesh, or the file cannot be written.
    """
    display, out = display or Display(), Path(options.out or f"{run.name}_on_{run.mesh.name}.html")
    check_file(str(out))
    program = on_mesh(run, processes)
    found, notes = drawing(program, options, display)
    try:
        out.write_text(html(found), encoding="utf-8")
    except OSError as error:
        raise Refused(f"out is {out}, which cannot be written ({error.strerror}): name another file.", IO) from error
    told = facts(found)
    display.say(
        f"Wrote {out}: {told['devices']} devices, {told['arrays']} weights, {memory(told['bytes'])} of them on each."
    )
    for note in notes:
        display.say(note)
    display.say(f"Next:\n  open {out} in a browser")
    return DONE


def drawing(program: Program, options: Options, display: Display) -> tuple[Drawing, list[str]]:
    """All that is drawn, and what could not be."""
    run, sizes, notes = program.run, Axes(**dict(program.mesh.shape)), []
    where = places.of(run.mesh, sizes)
    try:
        planned, missing = estimate(run, sizes), ""
    except Refused as refusal:
        planned, missing = None, f"No timeline: {refusal}"
        notes.append(missing)
    shown = Drawing(program, sizes, where, planned, None, (), missing)
    if planned is None:
        return shown, notes
    shown = dataclasses.replace(shown, timeline=timeline.analytic(planned), rows=communication(planned))
    if options.compiled:
        shown, note = with_compiler(shown, planned, display)
        notes += [note] if note else []
    return shown, notes


def with_compiler(shown: Drawing, planned: Estimate, display: Display) -> tuple[Drawing, str]:
    """The drawing with what the TPU compiler knows, or as it was and why."""
    run = planned.run
    if run.mesh.chip.platform != "tpu":
        return shown, f"Drawn without a compiler: mesh {run.mesh.name} is not of TPUs, and only theirs tells time."
    system.compiler_only()
    try:
        where = places.by_jax(run.mesh, planned.sizes)
        display.say("Compiling, a minute or so ...")
        report = compiled.report(run, planned.sizes, cache=plans(run))
    except NoCompiler as refusal:
        return shown, f"Drawn without the compiler: {refusal}"
    shown = dataclasses.replace(shown, places=where)
    if report.refusal or report.time is None:
        return shown, f"No compiled timeline: {report.refusal or 'the compiler gives no cycles for this chip'}."
    return dataclasses.replace(shown, timeline=timeline.compiled(report), rows=report.rows), ""
