"""`llmjax plan`: what a run will be on a cluster, before anyone rents it."""

import dataclasses
import json
from pathlib import Path

from llmjax import mesh as meshes
from llmjax import processes as system
from llmjax.errors import DONE, IO, Refused
from llmjax.mesh import AXES, Axes
from llmjax.plan import calibrate
from llmjax.plan.estimate import Estimate, Row, communication, estimate, plannable, type_check
from llmjax.processes import Processes
from llmjax.run import Run, to_json
from llmjax.train.display import Display, duration, memory


@dataclasses.dataclass(frozen=True)
class Options:
    """What is planned besides the run itself."""

    analytic: bool = False
    "Leave the compiler out: an answer in seconds."
    price_per_chip_hour: float = 0
    "What a chip costs for an hour, to tell what training costs."
    json: str = ""
    "File for the result."


def plan(run: Run, processes: Processes, options: Options) -> int:
    """Prints whether the run fits its cluster, what it will send, how long a step takes, and what to do next.

    Raises:
      Refused: the run, its mesh or an option cannot be used as asked.
    """
    check(options)
    display = Display()
    run = on_known_chips(run, processes, display)
    found = estimate(run)
    type_check(found)
    header(display, found)
    fit(display, found)
    sent(display, communication(found))
    times(display, found, options)
    display.say(following(found))
    if options.json:
        Path(options.json).write_text(json.dumps(facts(found), indent=1) + "\n", encoding="utf-8")
    return DONE


def check(options: Options) -> None:
    """Refuses, before anything is done, what would fail after it."""
    folder = Path(options.json).absolute().parent
    if not folder.is_dir():
        raise Refused(f"json is {options.json}, and {folder} is no folder: make it, or choose another file.", IO)
    if options.price_per_chip_hour < 0:
        raise Refused(f"price_per_chip_hour is {options.price_per_chip_hour}: give a positive price, or 0 for none.")


def on_known_chips(run: Run, processes: Processes, display: Display) -> Run:
    """The run on a mesh that says its chips: what this machine has where the mesh leaves that open.

    Emulated devices are measured the first time.
    """
    cluster = run.mesh
    if cluster.chips is None or cluster.chip is None:
        devices = system.start(cluster, processes)
        cluster = dataclasses.replace(cluster, chips=len(devices), chip=meshes.chip_of(cluster, devices))
    run = dataclasses.replace(run, mesh=cluster)
    plannable(run)
    if cluster.chip.flops is None and not calibrate.file(Path(run.runs), cluster.chips).exists():
        display.say(f"Measuring what {cluster.chips} emulated devices reach on this machine, about a minute ...")
        calibrate.store(calibrate.measure(system.start(cluster, processes)), Path(run.runs))
    return run


def header(display: Display, found: Estimate) -> None:
    """What is planned."""
    run = found.run
    display.facts(
        f"llmjax plan {run.name}",
        {
            "devices": f"{found.chips} x {run.mesh.chip.name}"
            + (f", {run.mesh.slices} slices" if run.mesh.slices > 1 else "")
            + (f" of {run.mesh.topology}" if run.mesh.topology else ""),
            "mesh": f"{run.mesh.name}: {cut(found.sizes)}; layout {run.layout.name}",
            "run": f"{run.batch:,} rows of {run.sequence:,} a step, {run.steps:,} steps",
            "compute": f"accumulation {found.accumulate}, remat {run.remat}",
        },
    )


def cut(sizes: Axes) -> str:
    """The axes that cut something."""
    return " x ".join(f"{a} {n}" for a, n in zip(AXES, sizes.sizes(), strict=True) if n > 1) or "one device"


def fit(display: Display, found: Estimate) -> None:
    """Bytes of a device by class, against what its chip has."""
    held, has = found.memory, found.run.mesh.chip.memory
    rows = {field.name: getattr(held, field.name) for field in dataclasses.fields(held)}
    verdict = "" if not has else f" of {memory(has)}: it {'fits' if found.fits else 'does NOT fit'}"
    display.say()
    display.facts("Fit, per device", {k: memory(v) for k, v in rows.items()} | {"total": memory(held.total) + verdict})


def sent(display: Display, rows: list[Row]) -> None:
    """What a step communicates."""
    display.say()
    if not rows:
        return display.say("Communication: none.")
    cells = [
        [f"{r.kind} over {' x '.join(r.axes) or '?'}", r.module, f"{r.count:,.0f}", memory(r.bytes), r.network,
         f"{1e3 * r.seconds:,.1f}", "hidden" if r.hidden else "waited for"]
        for r in rows
    ]  # fmt: skip
    display.table(["Communication of a step", "for", "runs", "bytes", "network", "ms", ""], cells)


def times(display: Display, found: Estimate, options: Options) -> None:
    """Where the time of a step goes, how fast that is, and what the whole run takes."""
    display.say()
    step = found.time.step
    rows = [[name, f"{1e3 * s:,.1f}", f"{100 * s / step:.0f}%"] for name, s in parts(found.time).items() if s]
    display.table(["Time of a step", "ms", ""], [*rows, ["step", f"{1e3 * step:,.1f}", ""]])
    chip_hours = found.hours * found.chips
    speed = {"speed": f"{found.tokens_per_s:,.0f} tokens/s, {found.per_chip:,.0f} per chip"}
    if found.mfu:
        speed["mfu"] = f"{100 * found.mfu[0]:.1f}% counting causal attention, {100 * found.mfu[1]:.1f}% all of it"
    speed["run"] = f"{found.run.steps:,} steps in {duration(3600 * found.hours)}, {chip_hours:,.0f} chip-hours" + (
        f", {chip_hours * options.price_per_chip_hour:,.0f} in money" if options.price_per_chip_hour else ""
    )
    display.say()
    display.facts("Speed", speed)


def parts(time) -> dict[str, float]:
    """The parts of a step by what a person calls them, in seconds."""
    own = dict(matmul=time.matmul, attention=time.attention, memory=time.memory)
    waits = {f"waiting over {axes}": seconds for axes, seconds in time.exposed.items()}
    return own | waits | {"pipeline bubble": time.bubble, "host and stragglers": time.host}


def following(found: Estimate) -> str:
    """What to do next."""
    name = found.run.name
    first = f"  llmjax train {name} --mesh {found.run.mesh.name}"
    return "\nNext:\n" + "\n".join([first] if found.fits else [f"  llmjax plan {name} --search"])


def facts(found: Estimate) -> dict:
    """The plan for machines."""
    time = dataclasses.asdict(found.time) | {"step": found.time.step}
    return dict(
        run=to_json(found.run), axes=dataclasses.asdict(found.sizes), accumulate=found.accumulate, fits=found.fits,
        memory=dataclasses.asdict(found.memory) | {"total": found.memory.total}, seconds=time, mfu=found.mfu,
        tokens_per_s=found.tokens_per_s, tokens_per_s_per_chip=found.per_chip, hours=found.hours,
        communication=[dataclasses.asdict(row) for row in communication(found)],
    )  # fmt: skip
