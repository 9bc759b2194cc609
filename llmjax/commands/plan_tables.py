"""What `llmjax plan` prints of one run on one mesh: fit, communication, time, and what to do next."""

import collections
import dataclasses
import functools
import shlex
from collections.abc import Sequence

from llmjax.mesh import AXES, Axes
from llmjax.plan import knobs
from llmjax.plan.analytic import Time
from llmjax.plan.buffers import Buffer
from llmjax.plan.compiled import Report
from llmjax.plan.estimate import ROOM, Estimate, communication, mfu, network, trusted
from llmjax.plan.memory import Memory
from llmjax.plan.schedule import Time as Compiled
from llmjax.run import Run, differences, to_json
from llmjax.train.display import Display, duration, memory
from llmjax.train.kernels import kernel

ROWS = 16  # of a table of communication
PLANNED = {"mesh", "axes", "layout", "pipeline", "remat", "accumulate"}  # what a plan's own command says in any case


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment as the user named it, before what the command line changes."""

    word: str
    "Its name, or its file."
    run: Run

    def changes(self, run: Run) -> list[str]:
        """The options that make this experiment the run, but for those that a plan decides."""
        before, after = to_json(self.run), to_json(run)
        words = []
        for path in differences(before, after):
            value = functools.reduce(lambda tree, key: (tree or {}).get(key), path.split("."), after)
            if path.split(".")[0] not in PLANNED and isinstance(value, (str, int, float)):
                name = path.replace("_", "-")
                group, dot, leaf = name.rpartition(".")
                flag = f"--{name}" if value else f"--{group}{dot}no-{leaf}"
                words.append(flag if isinstance(value, bool) else f"--{name} {shlex.quote(str(value))}")
        return words


def show(
    display: Display,
    asked: Experiment,
    found: Estimate,
    report: Report | None,
    measured: float | None,
    price: float,
) -> None:
    """All sections."""
    header(display, found)
    fit(display, found, report)
    display.say()
    sent(display, found, report)
    display.say()
    times(display, found, report)
    display.say()
    speed(display, found, report, measured, price)
    display.say(following(asked, found))


def header(display: Display, found: Estimate) -> None:
    """What is planned."""
    run = found.run
    slices = f", {run.mesh.slices} slices" if run.mesh.slices > 1 else ""
    shape = f" of {run.mesh.topology}" if run.mesh.topology else ""
    display.facts(
        f"llmjax plan {run.name}",
        {
            "devices": f"{found.chips} x {run.mesh.chip.name}{slices}{shape}",
            "mesh": f"{run.mesh.name}: {cut(found.sizes)}; layout {run.layout.name}{schedule(run, found.sizes)}",
            "run": f"{run.steps:,} steps of {run.batch:,} rows of {run.sequence:,}",
            "compute": f"accumulation {found.accumulate}, remat {run.remat}, attention {attention(run, found.sizes)}",
        },
    )


def attention(run: Run, sizes: Axes) -> str:
    """How it is computed, and why not in the kernel that such chips have."""
    way, lacking = kernel(run, sizes, run.mesh.chip)
    return f"{way} ({lacking})" if lacking else way


def cut(sizes: Axes) -> str:
    """The axes that cut something."""
    return " x ".join(f"{a} {n}" for a, n in zip(AXES, sizes.sizes(), strict=True) if n > 1) or "one device"


def schedule(run: Run, sizes: Axes) -> str:
    """How a pipeline runs, where there is one."""
    return f", {run.pipeline.schedule} of {run.pipeline.microbatches or 'two per stage'}" if sizes.stage > 1 else ""


def fit(display: Display, found: Estimate, report: Report | None) -> None:
    """Bytes of a device by class, against what its chip has, and what would free some where they do not fit."""
    has, shown = found.run.mesh.chip.memory, {"analytic": classes(found.memory)}
    if report:  # the compiler tells gradients, activations and what else comes and goes only together
        held = dict(parameters=report.memory.parameters, optimizer=report.memory.optimizer)
        rest = report.memory.total - sum(held.values())
        shown["compiled"] = held | {"temporaries": rest, "total": report.memory.total}
    rows = [
        [name, *(memory(held[name]) if held.get(name) else "" for held in shown.values())]
        for name in classes(found.memory)
    ]
    display.say()
    display.table(["Memory of a device", *shown], rows)
    if not has:
        return
    fits = report.fits if report else found.fits
    held = shown["compiled" if report else "analytic"]["total"]
    display.say(f"It {'fits' if fits else 'does NOT fit'}: {memory(held)} of {memory(has)}, {100 * held / has:.0f}%.")
    if not fits:
        if report and report.refusal:
            display.say(f"The compiler refuses it: {report.refusal}.")
        relief(display, found, report)


def relief(display: Display, found: Estimate, report: Report | None) -> None:
    """The largest buffers, and the changes that free the most."""
    if report and report.buffers:
        names = [f"{buffer.count} x {buffer.shape}" for buffer in report.buffers[:8]]
        said = [f"{memory(b.bytes)}, {b.what} {came_from(b)}" for b in report.buffers[:8]]
        display.say()
        display.facts("Largest buffers", dict(zip(names, said, strict=True)))
    limit = ROOM * found.run.mesh.chip.memory
    changes = varied(knobs.ranked(found.run, found.sizes, found.accumulate, limit, found.run.mesh.chip))
    if changes:
        display.say()
        display.facts(
            "What would help",
            {
                k.name: f"frees {memory(k.frees)}{', then it fits' if k.fits else ''}: {k.change} ({k.costs})"
                for k in changes
            },
        )


def came_from(buffer: Buffer) -> str:
    """The end of the traced operation's name, and where in this library it stands."""
    place = buffer.source.rpartition("/llmjax/")
    return f"{'/'.join(buffer.operation.split('/')[-4:])} {'llmjax/' if place[1] else ''}{place[2]}".strip()


def varied(changes: Sequence[knobs.Knob], each: int = 2) -> list[knobs.Knob]:
    """The best of each kind, so that ten ways to cut the positions do not hide that others help as well."""
    kinds = collections.Counter()
    return [k for k in changes if (kinds.update([k.name.split()[0]]) or kinds[k.name.split()[0]]) <= each]


def classes(held: Memory) -> dict[str, float]:
    """Bytes by class, and all of them."""
    return {field.name: getattr(held, field.name) for field in dataclasses.fields(held)} | {"total": held.total}


def sent(display: Display, found: Estimate, report: Report | None) -> None:
    """What a step communicates: what the compiler's program does, or what theory says."""
    compiled = report is not None and not report.refusal
    cells = [
        [
            f"{r.kind} over {' x '.join(r.axes) or '?'}",
            *(r.module, f"{r.count:,.0f}", memory(r.bytes), network(found.run.mesh.chip, r.network)),
            *(milliseconds(r.seconds), milliseconds(r.exposed)),
        ]
        for r in (report.rows if compiled else communication(found))
    ]
    if not cells:
        display.say("Communication: none.")
        return
    columns = ["Communication of a step", "for", "runs", "bytes", "network", "ms", "waited for"]
    if compiled and report.time is None:  # a compiler that knows no time says nothing of waiting either
        columns, cells = columns[:-1], [cell[:-1] for cell in cells]
    display.table(columns, cells[:ROWS])
    if len(cells) > ROWS:
        display.say(f"... and {len(cells) - ROWS} smaller ones, which --json has.")
    for warning in report.warnings if compiled else ():
        display.say(f"Look: {warning}")


def times(display: Display, found: Estimate, report: Report | None) -> None:
    """Where the time of a step goes, by each model, and which is trusted."""
    shown = {"analytic": found.time} | ({"compiled": report.time} if report and report.time else {})
    names = dict.fromkeys(name for time in shown.values() for name in parts(time))
    rows = [[name, *(milliseconds(parts(time).get(name, 0)) for time in shown.values())] for name in names]
    rows = [row for row in rows if set(row[1:]) != {"0.0"}]
    display.table(["Time of a step, ms", *shown], [*rows, ["step", *(milliseconds(t.step) for t in shown.values())]])
    which, why = trusted(found.run.mesh.chip, report is not None and report.time is not None)
    display.say(f"Trusted: {which}, {why}.")
    if report and report.unknown:
        names = ", ".join(f"{name} ({times:,})" for name, times in list(report.unknown.items())[:6])
        display.say(f"Without cycles from the compiler, so priced by their bytes: {names}.")


def parts(time: Time | Compiled) -> dict[str, float]:
    """The parts of a step by what a person calls them, in seconds."""
    own = dict(matmul=time.matmul, attention=time.attention, memory=time.memory)
    waits = {f"waiting over {axes}": seconds for axes, seconds in time.exposed.items()}
    if isinstance(time, Compiled):
        return own | {"kernels": time.other} | waits
    return own | waits | {"pipeline bubble": time.bubble, "host and stragglers": time.host}


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"


def speed(display: Display, found: Estimate, report: Report | None, measured: float | None, price: float) -> None:
    """Speed and cost, by the trusted model."""
    run = found.run
    which, _ = trusted(run.mesh.chip, report is not None and report.time is not None)
    step = (report if which == "compiled" else found).time.step
    tokens, hours = run.batch * run.sequence, run.steps * step / 3600
    rows = {"speed": f"{tokens / step:,.0f} tokens/s, {tokens / step / found.chips:,.0f} per device"}
    if shares := mfu(run, found.chips, step):
        rows["mfu"] = f"{100 * shares[0]:.1f}% with causal attention (C), {100 * shares[1]:.1f}% with all of it (F)"
    chip_hours = hours * found.chips / run.mesh.chip.devices
    cost = f", {chip_hours * price:,.0f} at {price:g} per chip-hour" if price else ""
    rows["run"] = f"{run.steps:,} steps, {tokens * run.steps:.3g} tokens, in {span(hours)}"
    rows["cost"] = f"{chip_hours:,.0f} chip-hours{cost}"
    if measured is not None:
        off = 100 * (step / measured - 1)
        rows["measured"] = f"{1e3 * measured:,.1f} ms/step here; predicted {1e3 * step:,.1f}, {off:+.0f}%"
    display.facts("Speed", rows)


def span(hours: float) -> str:
    """Hours as a person plans with them."""
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} hours" if hours >= 1 else duration(3600 * hours)


def following(asked: Experiment, found: Estimate) -> str:
    """What to do next."""
    changes = asked.changes(found.run)
    search = " ".join([f"  llmjax plan {asked.word} --mesh {found.run.mesh.name} --search", *changes])
    return "\nNext:\n" + "\n".join([search, *([f"  {command(asked, found)}"] if found.fits else [])])


def command(asked: Experiment, found: Estimate) -> str:
    """The command line that trains what was planned."""
    run = found.run
    words = [f"llmjax train {asked.word} --mesh {run.mesh.name} --layout {run.layout.name}"]
    for axis, size, own in zip(AXES, found.sizes.sizes(), asked.run.axes.sizes(), strict=True):
        words += [f"--axes.{axis} {size}"] if size > 1 or own else []
    if found.sizes.stage > 1:
        words += [f"--pipeline.schedule {run.pipeline.schedule} --pipeline.microbatches {run.pipeline.microbatches}"]
    words += ["--remat.offload"] if run.remat.offload else []
    return " ".join([*words, f"--remat.policy {run.remat.policy} --accumulate {found.accumulate}", *asked.changes(run)])


def facts(asked: Experiment, found: Estimate, report: Report | None = None, measured: float | None = None) -> dict:
    """The plan for machines."""
    time = {k: v for k, v in dataclasses.asdict(found.time).items() if k != "sent"}
    time |= dict(exposed=found.time.exposed, step=found.time.step)
    return dict(
        run=to_json(found.run), axes=dataclasses.asdict(found.sizes), accumulate=found.accumulate, fits=found.fits,
        memory=classes(found.memory) | {"total": found.memory.total}, seconds=time, mfu=found.mfu,
        tokens_per_s=found.tokens_per_s, tokens_per_s_per_device=found.per_chip, hours=found.hours,
        communication=[dataclasses.asdict(row) for row in communication(found)], command=command(asked, found),
        compiled=None if report is None else to_json(report), measured_step=measured,
    )  # fmt: skip
