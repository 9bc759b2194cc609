"""What can be changed in a run that does not fit a device's memory, and how much each change frees."""

import dataclasses
from collections.abc import Iterator

from llmjax import layout as layouts
from llmjax.checks import check, check_chip
from llmjax.errors import Refused
from llmjax.layout import Layout, axes_of, ways
from llmjax.mesh import AXES, Axes, Chip
from llmjax.optim.adafactor import Adafactor
from llmjax.optim.lion import Lion
from llmjax.optim.sgd import SGD
from llmjax.plan import memory
from llmjax.run import Remat, Run


@dataclasses.dataclass(frozen=True)
class Knob:
    """One change of a run."""

    name: str
    change: str
    "The flags of the command line that make it; of another optimizer, the field of the experiment."
    frees: int
    "Bytes of a device, predicted for the changed run."
    fits: bool
    "Whether the changed run is within the limit."
    costs: str
    "What is given up for it."


@dataclasses.dataclass(frozen=True)
class Change:
    """A run that differs from the one asked about."""

    name: str
    flags: str
    costs: str
    run: Run
    sizes: Axes
    accumulate: int


def ranked(run: Run, sizes: Axes, accumulate: int, limit: float, chip: Chip | None = None) -> list[Knob]:
    """The changes that free memory, the most first. `limit` is in bytes; what `llmjax.checks` refuses is left out.

    Each is predicted alone: two of them together free less than the sum where they free the same bytes.
    """
    now, found = memory.predict(run, sizes, accumulate, chip).total, []
    chip = chip or run.mesh.chip
    for change in _changes(run, sizes, accumulate, chip):
        try:
            check(change.run, change.sizes, change.accumulate)
            if chip:
                check_chip(change.run, chip)
        except Refused:
            continue
        then = memory.predict(change.run, change.sizes, change.accumulate, chip).total
        if then < now:
            found.append(Knob(change.name, change.flags, now - then, then <= limit, change.costs))
    return sorted(found, key=lambda knob: -knob.frees)


def _changes(run: Run, sizes: Axes, accumulate: int, chip: Chip | None = None) -> Iterator[Change]:
    yield from _recomputed(run, sizes, accumulate)
    yield from _loss(run, sizes, accumulate, chip)
    yield from _fewer_rows(run, sizes, accumulate)
    yield from _axes(run, sizes, accumulate)
    yield from _pipeline(run, sizes, accumulate)
    yield from _optimizers(run, sizes, accumulate)


def _recomputed(run: Run, sizes: Axes, accumulate: int) -> Iterator[Change]:
    costs = dict(
        none="",
        dots="the backward pass computes again all but attention and the products with weights",
        attention="the backward pass computes again all but attention and its products with weights",
        full="the backward pass computes every layer again: about a third more compute",
    )
    order = tuple(costs)
    for policy in order[order.index(run.remat.policy) + 1 :]:
        changed = dataclasses.replace(run, remat=Remat(policy, offload=run.remat.offload))
        yield Change(f"remat {policy}", f"--remat.policy {policy}", costs[policy], changed, sizes, accumulate)
    for policy in order[1:]:
        if run.remat.offload or order.index(policy) < order.index(run.remat.policy):
            continue
        changed = dataclasses.replace(run, remat=Remat(policy, offload=True))
        flags = "--remat.offload" if policy == run.remat.policy else f"--remat.policy {policy} --remat.offload"
        also = "what it keeps travels to the host and back" + (f"; {costs[policy]}" if policy in flags else "")
        yield Change(f"remat {policy}, offloaded", flags, also, changed, sizes, accumulate)


def _loss(run: Run, sizes: Axes, accumulate: int, chip: Chip | None) -> Iterator[Change]:
    """The loss in twice as many pieces, or eight times."""
    now = memory.pieces_of(run, sizes, accumulate, chip)
    for times in (2, 8):
        positions = run.sequence // now // times
        if positions:
            costs = "for each piece the gradient of the head is read and written"
            changed = dataclasses.replace(run, loss_chunk=positions)
            name = f"loss in {now * times} pieces"
            yield Change(name, f"--loss-chunk {positions}", costs, changed, sizes, accumulate)


def _fewer_rows(run: Run, sizes: Axes, accumulate: int) -> Iterator[Change]:
    for times in (2, 4):
        more = times * accumulate
        costs = "weights are gathered as many times more often, and products have fewer rows"
        changed = dataclasses.replace(run, accumulate=more)
        yield Change(f"accumulate x{times}", f"--accumulate {more}", costs, changed, sizes, more)
    half = run.batch // 2
    costs = "another run: half the tokens in a step"
    yield Change("batch halved", f"--batch {half}", costs, dataclasses.replace(run, batch=half), sizes, accumulate)


def _axes(run: Run, sizes: Axes, accumulate: int) -> Iterator[Change]:
    """The same devices with other axes, which data has to give, or fsdp.

    Where that leaves fewer devices to cut the batch, microbatches keep their rows and become more.
    """
    kinds = (
        ("fsdp", layouts.fsdp, ("data",), "weights are gathered for every layer, over the faster network"),
        ("tensor", layouts.tp, ("data", "fsdp"), "activations are summed over the axis in every layer, unhidden"),
        ("context", layouts.cp, ("data", "fsdp"), "keys and values are gathered in every layer"),
        ("context", layouts.ring, ("data", "fsdp"), "keys and values travel around a ring in every layer"),
    )
    for axis, kind, sources, costs in kinds:
        layout = _with(run.layout, kind)
        for source in sources:
            for times in _factors(getattr(sizes, source)):
                moved = dataclasses.replace(
                    sizes, **{axis: getattr(sizes, axis) * times, source: getattr(sizes, source) // times}
                )
                name = f"{axis} x{times} from {source}" + (f", {kind.name}" if axis == "context" else "")
                yield _placed(name, costs, run, layout, moved, accumulate * (1 if axis == "fsdp" else times))
    if sizes.tensor > 1 and "tensor" not in axes_of(run.layout.stream.get("T")):
        costs = "none: the same bytes travel, cut otherwise"
        yield _placed("sequence parallel", costs, run, _with(run.layout, layouts.sp), sizes, accumulate)


def _factors(size: int) -> list[int]:
    """2, 4 and all of an axis, as far as they divide it."""
    return sorted({n for n in (2, 4, size) if 1 < n <= size and size % n == 0})


def _with(layout: Layout, kind: Layout) -> Layout:
    """The layout and this kind; a ring and the gathering of all keys take each other's place."""
    parts = [name for name in layout.name.split("_") if name not in ("cp", "ring") or kind.name not in ("cp", "ring")]
    known = all(name in layouts.KINDS for name in parts)
    if not known:
        return layout | kind
    named = layouts.preset("_".join(parts)) if parts else layouts.dp
    return named if kind.name in parts else named | kind


def _placed(name: str, costs: str, run: Run, layout: Layout, sizes: Axes, accumulate: int) -> Change:
    """The run with this layout and these axes, and the flags for what differs."""
    flags = [f"--axes.{axis} {getattr(sizes, axis)}" for axis in AXES if axis in layout.axes()]
    flags += [f"--layout {layout.name}"] * (layout.name != run.layout.name)
    flags += [f"--accumulate {accumulate}"] * (accumulate != run.accumulate)
    changed = dataclasses.replace(run, layout=layout, accumulate=accumulate)
    return Change(name, " ".join(flags), costs, changed, sizes, accumulate)


def _pipeline(run: Run, sizes: Axes, accumulate: int) -> Iterator[Change]:
    if ways(run.layout.params.get("L"), sizes) == 1 or run.pipeline.schedule == "1f1b":
        return
    how = dataclasses.replace(run.pipeline, schedule="1f1b")
    costs = "each stage is computed again from its input, and the head on every stage"
    changed = dataclasses.replace(run, pipeline=how)
    yield Change("1f1b", "--pipeline.schedule 1f1b", costs, changed, sizes, accumulate)


def _optimizers(run: Run, sizes: Axes, accumulate: int) -> Iterator[Change]:
    if not run.offload_optimizer:
        changed = dataclasses.replace(run, offload_optimizer=True)
        costs = "its state travels to the device and back at every update"
        yield Change("optimizer offloaded", "--offload-optimizer", costs, changed, sizes, accumulate)
    if getattr(run.optimizer, "moments", "bfloat16") != "bfloat16":
        changed = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, moments="bfloat16"))
        costs = "another run: its moments are rounded to 8 bits of mantissa"
        yield Change("optimizer dtype", "--optimizer.moments bfloat16", costs, changed, sizes, accumulate)
    if run.parameters != "bfloat16":
        changed = dataclasses.replace(run, parameters="bfloat16")
        costs = "another run: matrices are rounded at random to 8 bits of mantissa at every step"
        yield Change("parameter dtype", "--parameters bfloat16", costs, changed, sizes, accumulate)
    schedule = getattr(run.optimizer, "schedule", None)
    kept = dict(schedule=schedule) if schedule else {}
    others = (
        (Lion(**kept), "Lion()", "one number of state per parameter"),
        (Adafactor(**kept), "Adafactor()", "rows and columns for state"),
        (SGD(momentum=0, **kept), "SGD(momentum=0)", "no state"),
    )
    for optimizer, text, state in others:
        if type(optimizer) is type(run.optimizer):
            continue
        name = type(optimizer).__name__
        costs = f"another run: {state}, and a learning rate to be found"
        changed = dataclasses.replace(run, optimizer=optimizer)
        yield Change(name, f"optimizer={text}", costs, changed, sizes, accumulate)
