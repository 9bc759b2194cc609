"""`llmjax plan`: what a run will be on a cluster, before anyone rents it."""

import dataclasses
import json
import statistics
from pathlib import Path

from llmjax import mesh as meshes
from llmjax import processes as system
from llmjax.bench import timing
from llmjax.commands import plan_meshes, plan_published, plan_tables
from llmjax.commands.plan_tables import Experiment
from llmjax.errors import DONE, IO, UNEQUAL, Refused
from llmjax.plan import calibrate, compiled, contract, kept, slices
from llmjax.plan.estimate import Estimate, estimate, plannable, sized, trusted, type_check
from llmjax.processes import Processes
from llmjax.run import Run
from llmjax.train.display import Display
from llmjax.train.program import make


@dataclasses.dataclass(frozen=True)
class Options:
    """What is planned, besides the run itself."""

    analytic: bool = False
    "Leave the compiler out: an answer in seconds."
    chip: str = ""
    "With --chips, a cluster that no mesh file describes: v4, v5e, v5p, v6e, tpu7x, a100, h100, h200 or b200."
    chips: int = 0
    "How many of them."
    search: bool = False
    "Look for the best mesh, layout, remat and accumulation of the cluster's chips."
    compile: int = 5
    "Meshes of a search that are compiled, the best ones."
    shown: int = 10
    "Meshes of a search that are shown."
    write: str = ""
    "File for the cluster as a mesh, such as meshes/mine.py."
    scale: tuple[int, ...] = ()
    "Numbers of chips for a weak-scaling table: the batch grows with the chips."
    write_contract: str = ""
    "File for what the step may send and hold."
    check: str = ""
    "File that --write-contract made: exit with 1 if the step sends or holds more."
    tolerance: float = 0.05
    "By how much of itself each of a contract's sizes may grow."
    published: str = ""
    "Table of published runs (CSV) to predict instead: how far the analytic model can be trusted."
    measure: bool = False
    "Train a few steps on this machine, to see prediction beside measurement."
    price_per_chip_hour: float = 0
    "What a chip costs for an hour, to tell what training costs."
    json: str = ""
    "File for the result."


def plan(asked: Experiment, run: Run, processes: Processes, options: Options) -> int:
    """Prints whether the run fits its cluster, what it will send, how long a step takes, and what to do next.

    Raises:
      Refused: the run, its mesh or an option cannot be used as asked.
    """
    check(options)
    system.compiler_only()
    display = Display()
    if options.published:
        return finish(plan_published.show(options.published, display), options)
    run = on_known_chips(run, processes, options)
    if options.scale:
        return finish(plan_meshes.scale(asked, run, options.scale, display), options)
    calibrated(run, processes, display)
    if options.search:
        timed = measurer(run, processes) if options.measure else None
        found = plan_meshes.best_mesh(asked, run, options, display, timed)
        if options.write:
            slices.write(Path(options.write), found.cluster)
            display.say(f"Wrote {options.write}.")
        return finish(found.facts, options)
    if options.write:
        slices.write(Path(options.write), run.mesh)
    if options.write_contract or options.check:
        return agree(run, options, display)
    return one(asked, run, processes, options, display)


def check(options: Options) -> None:
    """Refuses, before anything is done, what would fail after it."""
    for name in ("json", "write", "write_contract"):
        folder = Path(getattr(options, name)).absolute().parent
        if not folder.is_dir():
            field = getattr(options, name)
            raise Refused(f"{name} is {field}, and {folder} is no folder: make it, or choose another file.", IO)
    for name, least in dict(price_per_chip_hour=0, tolerance=0, compile=0, shown=1).items():
        if not getattr(options, name) >= least:
            raise Refused(f"{name} is {getattr(options, name)}: give at least {least}.")
    if bool(options.chip) != bool(options.chips):
        raise Refused(f"chip is '{options.chip}' and chips {options.chips}: give both, as in --chips 64 --chip v5p.")


def on_known_chips(run: Run, processes: Processes, options: Options) -> Run:
    """The run on a mesh that says its chips: what this machine has where the mesh leaves that open."""
    sized(run)
    cluster = slices.cluster(options.chip, options.chips) if options.chip else run.mesh
    if cluster.chips is None or cluster.chip is None:
        devices = system.start(cluster, processes)
        cluster = dataclasses.replace(cluster, chips=len(devices), chip=meshes.chip_of(cluster, devices))
    run = dataclasses.replace(run, mesh=cluster)
    plannable(run)
    return run


def calibrated(run: Run, processes: Processes, display: Display) -> None:
    """Measures what emulated devices reach here, the first time that a run on them is planned."""
    cluster = run.mesh
    if cluster.chip.flops is None and not calibrate.file(Path(run.runs), cluster.chips).exists():
        display.say(f"Measuring what {cluster.chips} devices of {cluster.chip.name} reach here, half a minute ...")
        calibrate.store(calibrate.measure(system.start(cluster, processes)), Path(run.runs))


def one(asked: Experiment, run: Run, processes: Processes, options: Options, display: Display) -> int:
    """The plan of one run on one mesh."""
    found = estimate(run)
    type_check(found)
    measure = measurer(run, processes) if options.measure else None
    with display.waiting(f"planning {run.name} for {run.mesh.chips} x {run.mesh.chip.name}"):
        report, why = compile_for(found, options)
    measured = None
    if measure:
        with display.waiting("measuring"):
            measured = measure(found)
    which, _ = trusted(run.mesh.chip, report is not None and report.time is not None)
    step, memory = (report if which == "compiled" else found).time.step, dataclasses.asdict(found.memory)
    kept.keep(run, found.sizes, found.accumulate, step, memory)
    plan_tables.show(display, asked, found, report, measured, options.price_per_chip_hour)
    if why:
        display.say(f"\n{why}")
    return finish(plan_tables.facts(asked, found, report, measured), options)


def compile_for(found: Estimate, options: Options) -> tuple[compiled.Report | None, str]:
    """(the compiler's report, why there is none)."""
    if options.analytic or found.run.mesh.chip.platform == "cpu":
        return None, ""
    try:
        return compiled.report(found.run, found.sizes, cache=plans(found.run)), ""
    except compiled.NoCompiler as refusal:
        return None, f"Without the compiler: {refusal}"


def plans(run: Run) -> Path:
    """Where reports of the compiler are kept."""
    return Path(run.runs) / ".cache" / "plans"


def measurer(run: Run, processes: Processes):
    """A function that times the steps of an estimate's run on the devices of this machine.

    Raises:
      Refused: this machine has no such devices.
    """
    devices = system.start(run.mesh, processes)

    def measure(found: Estimate) -> float:
        run = dataclasses.replace(found.run, accumulate=found.accumulate)
        program = make(run, meshes.device_mesh(found.sizes, devices, run.mesh.slices), run.mesh.chip)
        with program.context():
            seconds = timing.time_steps(program, warmup=2, repeats=8)
        return statistics.median(seconds)

    return measure


def agree(run: Run, options: Options, display: Display) -> int:
    """Writes the contract of the compiled step, or holds the step against one."""
    found = estimate(run)
    with display.waiting(f"compiling {run.name} for {run.mesh.chips} x {run.mesh.chip.name}"):
        report = compiled.report(run, found.sizes, cache=plans(run))
    if report.refusal:
        raise Refused(f"{run.name} does not compile for {run.mesh.name}, where {report.refusal}: see llmjax plan.")
    made = contract.of(report, run)
    if options.write_contract:
        contract.write(Path(options.write_contract), made)
        display.say(f"Wrote {options.write_contract}: {len(made.terms)} kinds of messages.")
    departures = contract.check(Path(options.check), made, options.tolerance) if options.check else []
    for departure in departures:
        display.say(departure)
    if options.check and not departures:
        display.say(f"{run.name} on {run.mesh.name} keeps to {options.check}.")
    return UNEQUAL if departures else DONE


def finish(facts: dict, options: Options) -> int:
    """Writes the result for machines, if wanted."""
    if options.json:
        Path(options.json).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return DONE
