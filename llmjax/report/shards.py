"""Pictures of where arrays live: a rectangle cut by mesh axes, and the part of it that a device holds."""

import math
from collections.abc import Mapping, Sequence

from llmjax.mesh import Axes
from llmjax.plan import arrays
from llmjax.plan.arrays import Array, Cuts, bytes_held
from llmjax.report.elements import Markup, tag
from llmjax.train.display import count, memory
from llmjax.train.program import Program

WIDE, HIGH, EDGE = 150, 92, 16  # of a rectangle, and the room for its rulers
BANDS = 64  # at most, in a rectangle
THIN = 3  # pixels that the part of a device has at least
Coordinates = Mapping[str, int]


def cut_by(dims: str, cuts: Cuts) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The axes that cut (rows, columns, layers): the first dim that is no L goes down, the others across."""
    pairs = list(zip(dims if "?" not in dims else "?" * len(cuts), cuts, strict=True))
    layers = tuple(a for d, axes in pairs if d == "L" for a in axes)
    rest = [axes for d, axes in pairs if d != "L"]
    if len(rest) == 1:
        return (), rest[0], layers
    return rest[0] if rest else (), tuple(a for axes in rest[1:] for a in axes), layers


def picture(dims: str, cuts: Cuts, sizes: Axes, at: Coordinates, title: str) -> Markup:
    """A rectangle with its cuts, a ruler for every axis that cuts it, and the part that the device `at` holds."""
    down, across, layers = cut_by(dims, cuts)
    flat = len(dims.removeprefix("L")) == 1
    left, top = EDGE * (not flat) + EDGE * bool(layers), EDGE  # alike at rest and in use
    high = 18 if flat else HIGH
    parts: list[Markup] = [tag("rect", x=left, y=top, width=WIDE, height=high, class_="whole")]
    parts += bands(down, sizes, left, top, WIDE, high, vertical=True)
    parts += bands(across, sizes, left, top, WIDE, high, vertical=False)
    parts += rulers(down, sizes, left - EDGE, top, 10, high, vertical=True)
    parts += rulers(across, sizes, left, 0, WIDE, 10, vertical=False)
    parts += rulers(layers, sizes, 0, top, 10, high, vertical=True)
    parts.append(mine(down, across, sizes, at, left, top, high))
    parts.append(tag("rect", x=left, y=top, width=WIDE, height=high, class_="frame"))
    width, height = left + WIDE + 2, top + high + 2
    return tag(
        "svg",
        tag("title", title),
        *parts,
        width=width,
        height=height,
        viewBox=f"-1 -1 {width} {height}",
        role="img",
        aria_label=title,
    )


def bands(axes: Sequence[str], sizes: Axes, x: float, y: float, w: float, h: float, *, vertical: bool) -> list[Markup]:
    """Stripes in the colour of the minor axis, darker as its coordinate grows."""
    total = math.prod(getattr(sizes, axis) for axis in axes)
    if total == 1:
        return []
    shown = max(n for n in range(1, min(total, BANDS) + 1) if total % n == 0)
    minor = min(getattr(sizes, axes[-1]), shown)
    found = []
    for i in range(shown):
        box = stripe(i, shown, x, y, w, h, vertical=vertical)
        found.append(tag("rect", **box, fill=f"var(--{axes[-1]})", fill_opacity=f"{shade(i % minor, minor):.2f}"))
    return found


def rulers(axes: Sequence[str], sizes: Axes, x: float, y: float, w: float, h: float, *, vertical: bool) -> list[Markup]:
    """One strip beside the rectangle: the parts of the major axis, in its colour."""
    if not axes:
        return []
    axis, found = axes[0], []
    shown = min(getattr(sizes, axis), BANDS)
    for i in range(shown):
        box = stripe(i, shown, x, y, w, h, vertical=vertical)
        found.append(tag("rect", **box, fill=f"var(--{axis})", fill_opacity=f"{shade(i, shown):.2f}"))
    return found


def mine(down, across, sizes: Axes, at: Coordinates, left: float, top: float, high: float) -> Markup:
    """The part of one device. The script moves it when another device is chosen."""
    (row, rows), (column, columns) = (arrays.piece(axes, at, sizes) for axes in (down, across))
    return tag(
        "rect",
        class_="mine",
        x=left + WIDE * column / columns,
        y=top + high * row / rows,
        width=max(THIN, WIDE / columns),
        height=max(THIN, high / rows),
        data_down=",".join(down),
        data_across=",".join(across),
        data_box=f"{left},{top},{WIDE},{high}",
    )


def stripe(i: int, n: int, x: float, y: float, w: float, h: float, *, vertical: bool) -> dict[str, float]:
    """The i-th of n stripes of a box, one below the other if they are cut `vertical`ly."""
    if vertical:
        return dict(x=x, y=y + h * i / n, width=w, height=h / n)
    return dict(x=x + w * i / n, y=y, width=w / n, height=h)


def shade(i: int, n: int) -> float:
    """How opaque the i-th of n parts is."""
    return 0.15 + 0.6 * i / max(1, n - 1)


def badges(dims: str, cuts: Cuts, sizes: Axes) -> Markup:
    """What cuts which dim, in words and colours."""
    found = []
    for d, axes in zip(dims, cuts, strict=True):
        for axis in axes:
            label = f"{d} over {axis} {getattr(sizes, axis)}" if d != "?" else f"{axis} {getattr(sizes, axis)}"
            found.append(tag("span", label, class_="badge", style=f"--c: var(--{axis})"))
    return tag("div", found or tag("span", "whole on every device", class_="soft"), class_="badges")


def shape_of(array: Array) -> str:
    """Letters and sizes."""
    if "?" in array.dims:
        return " x ".join(f"{size:,}" for size in array.shape)
    return " · ".join(f"{d} {size:,}" for d, size in zip(array.dims, array.shape, strict=True))


def used_bytes(array: Array, program: Program, sizes: Axes) -> tuple[int, str]:
    """(bytes of a weight on a device while it is used, of which layers)."""
    shape, many = list(array.shape), ""
    if array.dims.startswith("L") and array.used:
        stages = math.prod(getattr(sizes, axis) for axis in array.used[0])
        whole = stages > 1 and program.run.pipeline.gather_once
        shape[0] = array.shape[0] if whole else stages
        many = f"all {array.shape[0] // stages} layers of a stage" if whole else "one layer"
    return bytes_held(shape, array.used or array.rest, sizes, array.used_number), many


def weights(found: Sequence[Array], program: Program, sizes: Axes, at: Coordinates) -> list[Markup]:
    """A card for every kind of weight: at rest, and in use."""
    groups: dict[tuple, list[Array]] = {}
    for array in found:
        groups.setdefault((array.dims, array.shape, array.rest, array.used, array.number), []).append(array)
    order = sorted(groups.values(), key=lambda alike: -sum(a.size for a in alike))
    return [weight(alike, program, sizes, at) for alike in order]


def weight(alike: Sequence[Array], program: Program, sizes: Axes, at: Coordinates) -> Markup:
    """The card of weights that are cut alike."""
    one, names = alike[0], [array.name.rpartition(".")[2] for array in alike]
    many = len(alike) * one.size
    at_rest = bytes_held(one.shape, one.rest, sizes, one.number)
    each = " each" if len(alike) > 1 else ""
    rest = state("At rest", one.dims, one.rest, sizes, at, f"{memory(at_rest)} on a device{each}")
    if one.used is None:
        now = None
    elif one.used == one.rest:
        now = tag(
            "div", tag("h3", "In use"), tag("p", "As it lies: nothing is gathered.", class_="soft"), class_="state"
        )
    else:
        used, which = used_bytes(one, program, sizes)
        note = f"{memory(used)}{f', {which}' if which else ''}, gathered over {' and '.join(arrays.gathered(one))}"
        now = state("In use", one.dims, one.used, sizes, at, note)
    head = tag("div", tag("code", ", ".join(names)), " ", tag("small", f"{shape_of(one)} · {count(many)} numbers"))
    return tag("div", head, tag("div", rest, now, class_="row"), class_="card array")


def streams(found: Sequence[Array], sizes: Axes, at: Coordinates) -> list[Markup]:
    """A card for every activation."""
    cards = []
    for array in found:
        held = f"{memory(bytes_held(array.shape, array.rest, sizes, array.number))} on a device"
        head = tag("div", array.name, " ", tag("code", array.dims), " ", tag("small", shape_of(array)))
        cards.append(tag("div", head, state("", array.dims, array.rest, sizes, at, held), class_="card array"))
    return cards


def state(title: str, dims: str, cuts: Cuts, sizes: Axes, at: Coordinates, note: str) -> Markup:
    """A picture with its title, its cuts in words, and a note."""
    said = ", ".join(f"{d} over {' and '.join(axes)}" for d, axes in zip(dims, cuts, strict=True) if axes)
    shown = picture(dims, cuts, sizes, at, f"{title or 'Array'} {dims}: {said or 'whole on every device'}".strip())
    return tag(
        "div", tag("h3", title) if title else None, shown, badges(dims, cuts, sizes), tag("small", note), class_="state"
    )
