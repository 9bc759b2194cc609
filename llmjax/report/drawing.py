"""The page that `llmjax draw` writes: a run's mesh, what becomes of a matrix, where arrays live, and a step in time."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.layout import ways
from llmjax.mesh import AXES, Axes
from llmjax.plan import arrays
from llmjax.plan.estimate import Estimate
from llmjax.plan.places import Places
from llmjax.plan.schedule import Row
from llmjax.plan.timeline import Timeline
from llmjax.report import chips, matrix, shards, steps
from llmjax.report.elements import Markup, page, tag
from llmjax.train.display import memory
from llmjax.train.program import Program

SCHEDULES = ("gpipe", "circular", "1f1b")
CLASSES = ("parameters", "optimizer", "gradients", "activations", "temporaries")


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Everything that is drawn."""

    program: Program
    sizes: Axes
    places: Places
    estimate: Estimate | None
    "None where the run cannot be planned."
    timeline: Timeline | None
    rows: Sequence[Row]
    "Communication of a step."
    missing: str = ""
    "Why there is no timeline, as a sentence."


def html(found: Drawing) -> str:
    """The page."""
    run = found.program.run
    body = [
        Markup(HATCH),
        tag("h1", f"{run.name} on {run.mesh.name}"),
        tag("p", subtitle(found), class_="soft"),
        *mesh(found),
        *one_matrix(found),
        *everywhere(found),
        *in_time(found),
        *stages(found),
    ]
    return page(f"{run.name} on {run.mesh.name}", body, style=STYLE, script=script(found.sizes))


def subtitle(found: Drawing) -> str:
    """What is drawn, in a line."""
    run, chip = found.program.run, found.program.run.mesh.chip
    cut = " x ".join(f"{a} {n}" for a, n in zip(AXES, found.sizes.sizes(), strict=True) if n > 1) or "one device"
    many = len(found.places.places)
    return (
        f"{type(run.model).__name__}, layout {run.layout.name}: {cut}. {many} device{'s' * (many > 1)} of {chip.name}. "
        f"{run.batch:,} rows of {run.sequence:,} a step, in {found.program.accumulate} microbatch"
        f"{'es' * (found.program.accumulate > 1)}."
    )


def mesh(found: Drawing) -> list[Markup]:
    """Chips, axes, links."""
    last = len(found.places.places) - 1
    chooser = tag(
        "label",
        "Device ",
        tag("input", type="range", id="device", min=0, max=last, value=0),
        tag("output", name_of(found, 0), id="name", aria_live="polite"),
        class_="chooser",
    )
    how = (
        "as JAX places them"
        if found.places.exact
        else "by the rules that JAX follows; --compiled asks the TPU compiler's topology"
    )
    return [
        tag("h2", "The mesh"),
        tag(
            "p",
            f"Each square is a device, placed {how}. A line between two has the colour of the axis along which "
            "they differ, grey if there are several; shades grow with the coordinate. Choose a device here: the "
            "outlined part of every array "
            "below is what it holds.",
        ),
        chooser if last else None,
        *chips.groups(found.places, found.sizes),
        chips.legend(found.places, found.program.run.mesh, found.sizes, carries(found.rows)),
    ]


def name_of(found: Drawing, index: int) -> str:
    """A device and its coordinates."""
    pairs = zip(AXES, found.places.places[index].coordinates, strict=True)
    told = ", ".join(f"{axis} {at}" for axis, at in pairs if getattr(found.sizes, axis) > 1)
    return f"device {index}" + (f": {told}" if told else "")


def carries(rows: Sequence[Row]) -> Mapping[str, str]:
    """What every axis carries in a step, in words."""
    sums: dict[str, dict[str, float]] = {}
    for row in rows:
        for axis in row.axes:
            kinds = sums.setdefault(axis, {})
            kinds[row.kind] = kinds.get(row.kind, 0.0) + row.bytes
    return {
        axis: ", ".join(f"{kind} {memory(size)}" for kind, size in sorted(kinds.items(), key=lambda kv: -kv[1])[:3])
        for axis, kinds in sums.items()
    }


def one_matrix(found: Drawing) -> list[Markup]:
    """The strip that explains a layout."""
    weights = arrays.parameters(found.program)
    chosen = arrays.matrix(weights)
    if chosen is None:
        return []
    return [
        tag("h2", "What becomes of one matrix"),
        tag(
            "p",
            tag("code", chosen.name),
            f", {shards.shape_of(chosen)}. Drawn with at most four devices, so that their parts "
            "can be seen; the numbers are this mesh's.",
        ),
        tag("div", matrix.strip(chosen, found.program, found.sizes), class_="row strip"),
    ]


def everywhere(found: Drawing) -> list[Markup]:
    """The cards of all arrays, and the bytes of a device."""
    at = dict.fromkeys(AXES, 0)
    weights = shards.weights(arrays.parameters(found.program), found.program, found.sizes, at)
    streams = shards.streams(arrays.activations(found.program), found.sizes, at)
    return [
        tag("h2", "Where every array lives"),
        tag(
            "p",
            "Colours say over which axis a dim is cut, shades which part it is. The optimizer's state lies as its "
            "weights do.",
        ),
        *held(found.estimate),
        tag("h3", "Weights"),
        tag("div", weights, class_="row"),
        tag("h3", "Activations of a microbatch") if streams else None,
        tag("div", streams, class_="row") if streams else None,
    ]


def held(found: Estimate | None) -> list[Markup]:
    """The memory of a device as a bar."""
    if found is None:
        return []
    bytes_of = {name: getattr(found.memory, name) for name in CLASSES}
    has = found.run.mesh.chip.memory or sum(bytes_of.values())
    total = max(has, sum(bytes_of.values()))
    parts = [
        tag("div", class_=f"seg part{i}", style=f"width:{100 * size / total:.2f}%", title=f"{name}, {memory(size)}")
        for i, (name, size) in enumerate(bytes_of.items())
    ]
    words = ", ".join(f"{name} {memory(size)}" for name, size in bytes_of.items())
    of = f" of {memory(found.run.mesh.chip.memory)}" if found.run.mesh.chip.memory else ""
    return [
        tag("div", parts, class_="bar", role="img", aria_label=f"Memory of a device: {words}"),
        tag("p", f"A device, at the peak of a step: {memory(sum(bytes_of.values()))}{of}: {words}.", class_="soft"),
    ]


def in_time(found: Drawing) -> list[Markup]:
    """The timeline, or why there is none."""
    shown = steps.timeline(found.timeline) if found.timeline else [tag("p", found.missing)]
    return [tag("h2", "A step in time"), *shown]


def stages(found: Drawing) -> list[Markup]:
    """The schedules of a pipeline, the run's own first."""
    run, program = found.program.run, found.program
    count = ways(run.layout.params.get("L"), found.sizes)
    if count == 1:
        return []
    rows = run.batch // ways(run.layout.inner.get("B"), found.sizes) // program.accumulate
    parts, laps = run.pipeline.parts(rows, count), run.pipeline.repeats
    own = run.pipeline.schedule
    order = [own, *(schedule for schedule in SCHEDULES if schedule != own)]
    grids = [steps.pipeline(schedule, count, parts, laps, schedule == own) for schedule in order]
    return [
        tag("h2", "The pipeline"),
        tag(
            "p",
            "Stages down, ticks across; the number is the microbatch. ",
            tag("span", "forward", class_="badge", style="--c: var(--fsdp)"),
            " ",
            tag("span", "backward", class_="badge", style="--c: var(--tensor)"),
            " Paler: a later lap. In 1f1b a tick may have one of each.",
        ),
        tag("div", grids, class_="column"),
    ]


def script(sizes: Axes) -> str:
    """Moves the outlines to the part of the device that is chosen."""
    axes = ",".join(f"{axis}:{size}" for axis, size in zip(AXES, sizes.sizes(), strict=True))
    return SCRIPT.replace("AXES", "{" + axes + "}")


HATCH = """<svg width="0" height="0" aria-hidden="true" style="position:absolute"><defs><pattern id="partial" width="6"
height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="6" height="6" fill="var(--card)"/>
<rect width="2.5" height="6" fill="var(--wait)"/></pattern></defs></svg>"""

STYLE = """
.chooser { display: flex; gap: 10px; align-items: center; margin: 8px 0 14px; font-size: 14px; }
.chooser input { flex: 0 1 320px; min-width: 120px; accent-color: var(--ink); }
figure { margin: 0; } figcaption { font-size: 12px; color: var(--soft); text-align: center; }
.group { margin-bottom: 10px; }
.chip { cursor: pointer; outline: none; } .chip-back { fill: var(--paper); }
.chip-edge { fill: none; stroke: var(--line); } .chip .inner { stroke: var(--paper); stroke-width: 1; }
.chip.chosen .chip-edge, .chip:focus-visible .chip-edge { stroke: var(--mine); stroke-width: 3; }
.badge { display: inline-block; font-size: 12px; padding: 0 7px; border-radius: 9px; border: 1.5px solid var(--c);
  background: color-mix(in srgb, var(--c) 16%, transparent); margin: 1px 0; white-space: nowrap; }
.badges { display: flex; flex-wrap: wrap; gap: 4px; margin: 4px 0; }
.array { flex: 0 1 auto; max-width: 100%; } .array .row { gap: 18px; margin-top: 8px; }
.state { width: 186px; max-width: 100%; } .state small { display: block; }
@media (max-width: 480px) { .state { width: calc(50% - 6px); } .array .row { gap: 12px; } }
.array h3 { color: var(--soft); font-weight: 600; font-size: 13px; margin-bottom: 4px; }
.whole { fill: var(--idle); } .frame { fill: none; stroke: var(--soft); stroke-width: 1; }
.mine { fill: none; stroke: var(--mine); stroke-width: 2; }
.strip { align-items: stretch; } .step { flex: 1 1 186px; max-width: 100%; min-width: 186px; }
.step { display: flex; flex-direction: column; } .step .devices { margin-top: auto; }
.step p { font-size: 13px; margin: 2px 0 8px; }
.devices { display: grid; grid-template-columns: repeat(auto-fill, 76px); gap: 8px; }
.devices .frame { stroke-dasharray: 3 2; }
.bar { display: flex; height: 20px; background: var(--idle); border-radius: 4px; overflow: hidden; }
.bar .seg { border-right: 1px solid var(--paper); }
.part0 { background: #31598c; } .part1 { background: #5a86ba; } .part2 { background: #8fb0d6; }
.part3 { background: #d98a00; } .part4 { background: #e8b95c; }
.lane-row { margin-bottom: 4px; } .lane-name { font-size: 12px; color: var(--soft); }
.lane { position: relative; height: 26px; background: var(--idle); border-radius: 3px; overflow: hidden; }
.lane .seg { position: absolute; top: 0; bottom: 0; border-right: 1px solid var(--paper); overflow: hidden; }
.lane .seg span { font-size: 12px; line-height: 26px; padding: 0 5px; color: #fff; white-space: nowrap; }
.lane .thin { border-right: 0; min-width: 1px; }
.lane .phase { border: 1px solid var(--line); } .lane .phase span { color: var(--ink); }
.lane .memory span, .lane .attention span, .lane .idle span { color: #12161b; }
.lane .exposed::after { content: ""; position: absolute; inset: 0;
  background: repeating-linear-gradient(45deg, var(--wait) 0 3px, transparent 3px 7px); }
.ends { display: flex; justify-content: space-between; font-size: 12px; color: var(--soft); margin-bottom: 6px; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--soft); font-size: 14px; }
.column { display: flex; flex-direction: column; gap: 12px; }
.cell.F { fill: var(--fsdp); } .cell.B { fill: var(--tensor); } .cell.later { fill-opacity: 0.55; }
svg text.cell { fill: #fff; } @media (prefers-color-scheme: dark) { svg text.cell { fill: #10141a; }
  .lane .seg span { color: #10141a; } .lane .phase span { color: var(--ink); } .lane .idle span { color: var(--ink); } }
"""

SCRIPT = """
const sizes = AXES, names = Object.keys(sizes), slider = document.getElementById("device");
const devices = Object.fromEntries([...document.querySelectorAll(".chip")].map(c => [index(c.dataset.at), c]));
function index(at) { return at.split(",").reduce((i, c, n) => i * sizes[names[n]] + Number(c), 0); }
function part(axes, at) {
  return axes.split(",").filter(Boolean).reduce(([i, n], a) => [i * sizes[a] + at[a], n * sizes[a]], [0, 1]);
}
function choose(chip) {
  const at = Object.fromEntries(chip.dataset.at.split(",").map((c, n) => [names[n], Number(c)]));
  document.querySelectorAll(".chip.chosen").forEach(c => c.classList.remove("chosen"));
  chip.classList.add("chosen");
  document.querySelectorAll("rect.mine").forEach(r => {
    const [x, y, w, h] = r.dataset.box.split(",").map(Number);
    const [row, rows] = part(r.dataset.down, at), [column, columns] = part(r.dataset.across, at);
    r.setAttribute("x", x + w * column / columns); r.setAttribute("width", Math.max(3, w / columns));
    r.setAttribute("y", y + h * row / rows); r.setAttribute("height", Math.max(3, h / rows));
  });
  if (slider) { slider.value = index(chip.dataset.at); document.getElementById("name").value = chip.dataset.name; }
}
Object.values(devices).forEach(c => {
  c.addEventListener("click", () => choose(c));
  c.addEventListener("keydown", e => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); choose(c); } });
});
if (slider) slider.addEventListener("input", () => choose(devices[slider.value]));
if (devices[0]) choose(devices[0]);
"""


def facts(found: Drawing) -> dict[str, Any]:
    """What the terminal says of the drawing."""
    weights = arrays.parameters(found.program)
    sizes = found.sizes
    rest = sum(arrays.bytes_held(a.shape, a.rest, sizes, a.number) for a in weights)
    return dict(devices=len(found.places.places), arrays=len(weights), bytes=rest)
