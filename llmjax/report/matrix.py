"""Pictures of what becomes of one matrix in a step: at rest, gathered, used, and its gradient."""

import itertools
from collections.abc import Sequence

from llmjax.layout import axes_of
from llmjax.mesh import AXES, Axes
from llmjax.plan import arrays
from llmjax.plan.arrays import Array, Cuts, bytes_held
from llmjax.report.elements import Markup, tag
from llmjax.report.shards import Coordinates, bands, cut_by
from llmjax.train.display import memory
from llmjax.train.program import Program


def witnesses(sizes: Axes) -> list[Coordinates]:
    """The coordinates of all devices of a small mesh."""
    every = itertools.product(*(range(size) for size in sizes.sizes()))
    return [dict(zip(AXES, at, strict=True)) for at in every]


def few(axes: Sequence[str], sizes: Axes) -> Axes:
    """At most four devices, which show what one of many does: four along one axis, or two along each of two."""
    cutting = [axis for axis in axes if getattr(sizes, axis) > 1]
    most = {axis: 4 if len(cutting) == 1 else 2 for axis in cutting[:2]}
    return Axes(**{axis: min(getattr(sizes, axis), most.get(axis, 1)) for axis in AXES})


def strip(array: Array, program: Program, sizes: Axes) -> list[Markup]:
    """What happens to one matrix in a step, on so few devices that their parts can be seen."""
    skip = array.dims.startswith("L")  # of one layer
    dims, rest, used = array.dims[skip:], array.rest[skip:], (array.used or array.rest)[skip:]
    gathers, sums = arrays.gathered(array), arrays.summed(array, program)
    kept = [axis for axis in AXES if any(axis in axes for axes in used)]
    small = few([*gathers, *kept, *sums], sizes)
    seen = witnesses(small)
    own = [mini(dims, rest, small, at, "own") for at in seen]
    partial = [mini(dims, used, small, at, "partial") for at in seen]
    use = [mini(dims, used, small, at, "gathered" if gathers else "own", rest) for at in seen]
    held = memory(bytes_held(array.shape[skip:], rest, sizes, array.number))
    whole = memory(bytes_held(array.shape[skip:], used, sizes, array.used_number))
    open_sum = bool(gathers or sums)
    told = [
        ("At rest", f"A device keeps {held} of {'one layer of ' * skip}{array.name.rpartition('.')[2]}.", own),
        ("All-gather" if gathers else "In use", used_so(gathers, whole), use),
        ("Product", product(program, kept), products(array, program, small, seen)),
        ("Gradient", "Hatched: a sum that is not complete yet." if open_sum else "Complete at once.",
         partial if open_sum else own),
        ("Reduce-scatter" if gathers else "All-reduce" if sums else "Update", given_back(gathers, sums), own),
    ]  # fmt: skip
    return [
        tag("div", tag("h3", f"{number}  {title}"), tag("p", text),
            tag("div", captioned(pictures, seen), class_="devices"), class_="card step")
        for number, (title, text, pictures) in enumerate(told, 1)
    ]  # fmt: skip


def used_so(gathers: Sequence[str], whole: str) -> str:
    """How a device comes to the weight that it multiplies by, in words."""
    if not gathers:
        return f"As it lies: nothing travels. Each device multiplies its tokens by the {whole} it has."
    return (
        f"Devices along {' and '.join(gathers)} send each other their parts: an all-gather, after which each has "
        f"{whole} of it. It is dropped again after use."
    )


def given_back(gathers: Sequence[str], sums: Sequence[str]) -> str:
    """What becomes of the gradients that devices have from their own tokens, in words."""
    told = []
    if gathers or sums:
        told.append("Every device has a gradient from its own tokens alone.")
    if gathers:
        over = " and ".join(gathers)
        told.append(f"Along {over} they are added, and each gets only the part that it keeps: a reduce-scatter.")
    if sums:
        told.append(f"Over {' and '.join(sums)} they are added and everyone keeps the sum: an all-reduce.")
    return " ".join(told) or "Each device has the gradient of its own part, from all tokens."


def product(program: Program, kept: Sequence[str]) -> str:
    """What a device computes with the weight, in words."""
    tensor = [axis for axis in kept if axis != "stage"]
    if not tensor:
        return "Each device has all of the weight in hand, and its own rows of the batch: rows of the result."
    split = set(tensor) & {*axes_of(program.run.layout.stream.get("T"))}
    how = "a reduce-scatter and an all-gather" if split else "an all-reduce"
    return (
        f"Along {' and '.join(tensor)} each device has some columns, and so some columns of the result; the weight "
        f"after it has the matching rows, and its partial sums are added by {how} of activations."
    )


def products(array: Array, program: Program, sizes: Axes, seen: Sequence[Coordinates]) -> list[Markup]:
    """The result of the product on every witness: rows by what cuts the batch, columns by what cuts the weight."""
    letter = array.dims[-1]
    layout = program.run.layout
    spec = [tuple(a for a in axes_of(part) if getattr(sizes, a) > 1) for part in layout.activation(f"BT{letter}")]
    return [mini(f"B{letter}", (spec[0], spec[2]), sizes, at, "result") for at in seen]


def mini(dims: str, cuts: Cuts, sizes: Axes, at: Coordinates, how: str, parts: Cuts | None = None) -> Markup:
    """A small outline of a matrix, and in it what one device has: its own, gathered from others, or a partial sum."""
    w, h = 72, 52
    down, across, _ = cut_by(dims, cuts)
    (row, rows), (column, columns) = (arrays.piece(axes, at, sizes) for axes in (down, across))
    box = dict(x=w * column / columns, y=h * row / rows, width=max(4, w / columns), height=max(4, h / rows))
    axis = (*across, *down)[-1] if across or down else None
    fill = f"var(--{axis})" if axis else "var(--matmul)"
    inside: list[Markup] = []
    if how == "gathered" and parts is not None:
        below, beside, _ = cut_by(dims, parts)
        fresh = [tuple(a for a in axes if a not in old) for axes, old in ((below, down), (beside, across))]
        inside = bands(fresh[0], sizes, *box.values(), vertical=True)
        inside += bands(fresh[1], sizes, *box.values(), vertical=False)
    elif how == "partial":
        inside = [tag("rect", **box, fill="url(#partial)")]
    else:
        inside = [tag("rect", **box, fill=fill, fill_opacity="0.75")]
    outline = tag("rect", x=0, y=0, width=w, height=h, class_="frame")
    return tag(
        "svg",
        inside,
        outline,
        width=w + 2,
        height=h + 2,
        viewBox=f"-1 -1 {w + 2} {h + 2}",
        role="img",
        aria_label=f"{dims}, {how}",
    )


def captioned(pictures: Sequence[Markup], seen: Sequence[Coordinates]) -> list[Markup]:
    """Pictures with the coordinates of their devices."""
    differs = [axis for axis in AXES if len({at[axis] for at in seen}) > 1]
    names = [", ".join(f"{axis} {at[axis]}" for axis in differs) or "the device" for at in seen]
    return [tag("figure", shown, tag("figcaption", name)) for shown, name in zip(pictures, names, strict=True)]
