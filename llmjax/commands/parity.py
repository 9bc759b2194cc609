"""`llmjax parity`: shows that a run gives the same numbers under every layout, on emulated devices.

Behind `llmjax launch` it shows the same for several processes; one device is then one of each process's own.
"""

import dataclasses
import json
import platform
import time
from pathlib import Path

import jax
import numpy as np

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax import names
from llmjax import processes as system
from llmjax.checks import check
from llmjax.errors import DONE, IO, UNEQUAL, Refused
from llmjax.evaluate.parity import Tolerance, Trace, Verdict, compare, small, trace
from llmjax.mesh import AXES, Axes, Cluster
from llmjax.processes import Processes
from llmjax.run import Run, to_json
from llmjax.train.display import Display
from llmjax.train.program import resolve

# Every kind, and the products that large runs use; what a model or a mesh cannot be cut by is left out.
USUAL = ("fsdp", "tp", "cp", "ring", "ep", "pp", "fsdp_tp_sp", "fsdp_tp_ring", "fsdp_tp_pp", "fsdp_tp_ep")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared with one device, and how closely."""

    meshes: tuple[str, ...] = ("cpu8",)
    "Meshes this machine has or emulates."
    layouts: tuple[str, ...] = ()
    "Layouts; none: the experiment's own and all usual ones that the model can be cut by."
    full: bool = False
    "Keep the experiment's own widths, batch and sequence, where they would be made small."
    tolerance: Tolerance = Tolerance()
    json: str = ""
    "File for the result."


@dataclasses.dataclass(frozen=True)
class Case:
    """One layout on one mesh."""

    run: Run
    axes: Axes

    def title(self) -> str:
        return f"{self.run.layout.name} on {self.run.mesh.name}"

    def cut(self) -> str:
        """The axes that cut something."""
        sizes = zip(AXES, self.axes.sizes(), strict=True)
        return " x ".join(f"{axis} {size}" for axis, size in sizes if size > 1) or "one device"


def parity(run: Run, processes: Processes, options: Options) -> int:
    """Trains the same few steps under every layout and on one device, and prints how far they are apart.

    Raises:
      Refused: the run, a mesh or a layout cannot be used as asked.
    """
    if not hasattr(run.model, "vocab"):
        raise Refused(f"{run.name} is no language model: give one of the others that `llmjax experiments` lists.")
    folder = Path(options.json).absolute().parent
    if not folder.is_dir():
        raise Refused(f"json is {options.json}, and {folder} is no folder: make it, or choose another file.", IO)
    run = run if options.full else small(run)
    run = dataclasses.replace(run, accumulate=run.accumulate or 1)
    clusters = [names.load("meshes", name, "cluster") for name in options.meshes]
    devices = start(clusters, processes)
    chosen = cases(run, clusters, options, len(devices))
    jax.config.update("jax_disable_most_optimizations", True)  # compiles in a third of the time; the same partitions
    first = jax.process_index() == 0
    display = Display(quiet=not first)
    display.say(f"llmjax parity {run.name}: {run.steps} steps in float32 against one device; {shape(run)}")
    one = Case(dataclasses.replace(run, layout=layouts.dp), Axes(1, 1, 1, 1, 1, 1))
    traces, verdicts = [], []
    with display.waiting("one device"):
        reference = follow(one, jax.local_devices())
    for case in chosen:
        began = time.monotonic()
        with display.waiting(f"{case.title()} ({case.cut()})"):
            traces.append(follow(case, devices))
        verdicts.append(compare(reference, traces[-1], options.tolerance))
        seconds = f"{time.monotonic() - began:.1f} s"
        display.say(f"{case.title()} ({case.cut()}): {outcome(verdicts[-1])}, {seconds}")
    show(display, run, chosen, reference, traces, verdicts, options.tolerance)
    if options.json and first:
        write(Path(options.json), run, options, chosen, reference, traces, verdicts)
    return DONE if all(verdict.passed for verdict in verdicts) else UNEQUAL


def start(clusters: list[Cluster], processes: Processes) -> list[jax.Device]:
    """The devices of the largest of these meshes, which the others take their first ones of."""
    for cluster in clusters:
        if cluster.chips is not None and not cluster.emulated:
            raise Refused(
                f"mesh {cluster.name} is {cluster.chips} chips that this machine does not have: "
                f"compare on emulated devices, --meshes cpu8."
            )
    return system.start(max(clusters, key=lambda cluster: cluster.chips or 0), processes)


def cases(run: Run, clusters: list[Cluster], options: Options, found: int) -> list[Case]:
    """What is compared. A layout that the user did not ask for is left out where it cannot be."""
    wanted = options.layouts or tuple(dict.fromkeys((run.layout.name, *USUAL)))
    result = []
    for cluster in clusters:
        for name in wanted:
            layout = run.layout if name == run.layout.name else layouts.preset(name)
            one = dataclasses.replace(run, mesh=cluster, layout=layout)
            try:
                axes = resolve(one, cluster.chips or found)
                check(one, axes, run.accumulate)
            except Refused:
                if options.layouts:
                    raise
                continue
            result.append(Case(one, axes))
    return result


def follow(case: Case, devices: list[jax.Device]) -> Trace:
    count = int(np.prod(case.axes.sizes()))
    mesh = meshes.device_mesh(case.axes, devices[:count])
    return trace(case.run, mesh, meshes.chip_of(case.run.mesh, devices), case.run.steps)


def shape(run: Run) -> str:
    """The model in a few words."""
    model = run.model
    parts = [
        f"{getattr(model, name)} {name}" for name in ("layers", "heads", "kv_heads", "experts") if hasattr(model, name)
    ]
    return f"{type(model).__name__}, {', '.join(parts)}, width {model.width}"


def outcome(v: Verdict) -> str:
    if not v.passed:
        return f"differs, first in {v.first}" if v.first else "differs"
    rest = f" for {v.rounded} steps, then rounding chose other experts for a few tokens" if v.rounded else ""
    return f"the same numbers{rest}"


def verdict(v: Verdict) -> str:
    if not v.passed:
        return f"FAIL {v.first}"
    return f"pass ({v.rounded} steps)" if v.rounded else "pass"


def show(display, run, chosen, reference, traces, verdicts, tolerance) -> None:
    """Two tables: the losses, and how far everything is apart."""
    rows = [["one device", *(f"{loss:.6f}" for loss in reference.losses)]]
    rows += [[case.title(), *(f"{loss:.6f}" for loss in t.losses)] for case, t in zip(chosen, traces, strict=True)]
    display.say()
    display.table(["loss at step", *(str(step + 1) for step in range(run.steps))], rows)
    display.say()
    display.table(
        ["largest difference of", "loss", "gradient norm", "gradient", "weights", ""],
        [
            [
                f"{case.title()} ({case.cut()})",
                *(f"{x:.1e}" for x in (v.loss, v.grad_norm, v.gradient)),
                "" if v.rounded else f"{v.parameter:.1e}",
                verdict(v),
            ]
            for case, v in zip(chosen, verdicts, strict=True)
        ],
    )
    display.say()
    failed = sum(not v.passed for v in verdicts)
    display.say(
        f"{len(verdicts) - failed} of {len(verdicts)} give the numbers of one device: loss within {tolerance.loss:g}, "
        f"gradients within {tolerance.gradient:g}, weights after {run.steps} steps within {tolerance.parameter:g}."
    )


def write(path, run, options, chosen, reference, traces, verdicts) -> None:
    """The tables for machines."""
    results = [
        dict(layout=case.run.layout.name, mesh=case.run.mesh.name, axes=dataclasses.asdict(case.axes),
             losses=t.losses.tolist(), grad_norms=t.grad_norms.tolist(), **dataclasses.asdict(v))
        for case, t, v in zip(chosen, traces, verdicts, strict=True)
    ]  # fmt: skip
    one = dict(losses=reference.losses.tolist(), grad_norms=reference.grad_norms.tolist())
    facts = dict(
        run=to_json(run), tolerance=dataclasses.asdict(options.tolerance), one_device=one, results=results,
        jax=jax.__version__, python=platform.python_version(),
    )  # fmt: skip
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
