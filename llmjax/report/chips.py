"""Pictures of a mesh: chips on their torus or in their nodes, and which mesh axis runs along which links."""

import math
from collections.abc import Mapping, Sequence

from llmjax.mesh import AXES, Axes, Cluster
from llmjax.plan import links, places
from llmjax.plan.places import Place, Places
from llmjax.report.elements import Markup, table, tag
from llmjax.report.shards import shade

LETTERS = "xyzw"


def groups(found: Places, sizes: Axes) -> list[Markup]:
    """Every slice or node with its chips, in planes where it has three dims."""
    cutting = [axis for axis in AXES if getattr(sizes, axis) > 1]
    cutting = sorted(cutting, key=lambda axis: -getattr(sizes, axis))[:3]
    by_place = {(place.group, place.position): i for i, place in enumerate(found.places)}
    moves = places.moving(found)
    cards = []
    for group in range(found.groups):
        title = f"{found.kind} {group}" if found.groups > 1 else ""
        planes = [plane(found, by_place, group, first, cutting, sizes) for first in firsts(found.shape)]
        cards.append(
            tag("div", tag("small", title) if title else None, tag("div", planes, class_="row"), class_="group")
        )
    between = moves.get(0, ()) if len(found.shape) > 2 else ()
    note = f"Between planes, along x: {' and '.join(between)}." if between else None
    return [tag("div", cards, class_="row"), tag("p", note, class_="soft") if note else None]


def firsts(shape: Sequence[int]) -> Sequence[int | None]:
    """What the first dim of a torus is in every plane that is drawn; None where there is one plane."""
    return range(shape[0]) if len(shape) > 2 else (None,)


def plane(
    found: Places, by_place: Mapping, group: int, first: int | None, cutting: Sequence[str], sizes: Axes
) -> Markup:
    """The chips of one plane as a grid, with the links between neighbours."""
    shape = found.shape if first is None else found.shape[1:]
    rows = 1 if len(shape) == 1 else shape[0]
    columns = math.prod(shape) // rows
    cell = 34 if columns <= 4 and len(found.places) <= 64 else 26 if columns <= 8 and len(found.places) <= 128 else 16
    gap = cell // 3
    step = cell + gap
    drawn: list[Markup] = []
    at: dict[tuple[int, int], Place] = {}
    for row in range(rows):
        for column in range(columns):
            inner = (column,) if len(shape) == 1 else (row, *_unravel(column, shape[1:]))
            index = by_place[group, inner if first is None else (first, *inner)]
            at[row, column] = found.places[index]
            drawn.append(chip(found.places[index], index, column * step, row * step, cell, cutting, sizes))
    wires = [
        wire(at[row, column], at[row + down, column + across], column * step, row * step, cell, gap, bool(down))
        for row in range(rows)
        for column in range(columns)
        for down, across in ((0, 1), (1, 0))
        if (row + down, column + across) in at
    ]
    width, height = columns * step - gap + 2, rows * step - gap + 2
    label = f"Chips {'' if first is None else f'of plane x {first} '}of {found.kind} {group}"
    shown = tag(
        "svg",
        wires,
        drawn,
        width=width,
        height=height,
        viewBox=f"-1 -1 {width} {height}",
        role="group",
        aria_label=label,
    )
    return tag("figure", shown, tag("figcaption", f"x {first}") if first is not None else None)


def chip(place: Place, index: int, x: float, y: float, cell: float, cutting: Sequence[str], sizes: Axes) -> Markup:
    """A device: filled in the colour of the largest axis, with smaller squares for the second and the third."""
    told = ", ".join(f"{a} {c}" for a, c in zip(AXES, place.coordinates, strict=True) if getattr(sizes, a) > 1)
    squares = [tag("rect", x=x, y=y, width=cell, height=cell, rx=3, class_="chip-back")]
    for axis, part in zip(cutting, (1.0, 0.5, 0.22), strict=False):
        side, coordinate = cell * part, place.coordinates[AXES.index(axis)]
        inset = (cell - side) / 2
        squares.append(
            tag(
                "rect",
                x=x + inset,
                y=y + inset,
                width=side,
                height=side,
                rx=3 * part,
                fill=f"var(--{axis})",
                fill_opacity=f"{shade(coordinate, getattr(sizes, axis)):.2f}",
                class_="inner" if part < 1 else None,
            )
        )
    squares.append(tag("rect", x=x, y=y, width=cell, height=cell, rx=3, class_="chip-edge"))
    name = f"device {index}" + (f": {told}" if told else "")
    return tag(
        "g",
        tag("title", name),
        squares,
        class_="chip",
        data_at=",".join(map(str, place.coordinates)),
        data_name=name,
        tabindex=0,
        role="button",
        aria_label=name,
    )


def wire(a: Place, b: Place, x: float, y: float, cell: float, gap: float, down: bool) -> Markup:
    """The link between two neighbours, in the colour of the axis along which they differ."""
    axes = [name for name, p, q in zip(AXES, a.coordinates, b.coordinates, strict=True) if p != q]
    colour = f"var(--{axes[0]})" if len(axes) == 1 else "var(--soft)"
    half = cell / 2
    box = (
        dict(x1=x + half, y1=y + cell, x2=x + half, y2=y + cell + gap)
        if down
        else dict(x1=x + cell, y1=y + half, x2=x + cell + gap, y2=y + half)
    )
    return tag("line", **box, stroke=colour, stroke_width=max(2, gap / 3), class_="wire")


def legend(found: Places, cluster: Cluster, sizes: Axes, carries: Mapping[str, str]) -> Markup:
    """Every axis: its size, where it lies, over which links it speaks, and what it carries."""
    rows = []
    for axis in AXES:
        size = getattr(sizes, axis)
        if size > 1:
            mark = tag("span", axis, class_="badge", style=f"--c: var(--{axis})")
            rows.append([mark, size, lies(found, cluster, sizes, axis), wires(cluster, sizes, axis), carries.get(axis)])
    if not rows:
        return tag("p", "One device: nothing is cut, and nothing travels.")
    return table(["axis", "size", "lies on", "links", "carries in a step"], rows, numbers=(1,))


def lies(found: Places, cluster: Cluster, sizes: Axes, axis: str) -> str:
    """Where a mesh axis lies, in words."""
    size, parts = getattr(sizes, axis), []
    if not cluster.chip.torus:
        where = links.span(cluster, sizes, (axis,))
        if where.outside > 1:
            parts.append(f"{where.outside} {found.kind}s")
        if where.inside > 1:
            parts.append(f"{where.inside} devices of one {found.kind}")
        return ", ".join(parts)
    if axis == "data" and cluster.slices > 1 and size > 1:
        parts.append(f"{math.gcd(size, cluster.slices)} slices")
    if found.exact:
        dims = [dim for dim, axes in places.moving(found).items() if axis in axes]
        return ", ".join([*parts, *(f"torus axis {LETTERS[dim]}" for dim in dims)])
    for part in sorted(links.lying(cluster, sizes).get(axis, ()), key=lambda part: part.dim):
        whole = found.shape[part.dim]
        much = f"all {whole}" if part.length == whole else f"{part.length} of {whole}"
        parts.append(f"torus axis {LETTERS[part.dim]} ({much})")
    return ", ".join(parts)


def wires(cluster: Cluster, sizes: Axes, axis: str) -> str:
    """The links of an axis with their bandwidth."""
    chip, where = cluster.chip, links.span(cluster, sizes, (axis,))
    fast, slow = dict(tpu=("ICI", "DCN"), gpu=("NVLink", "network")).get(chip.platform, ("memory", "memory"))
    told = []
    if where.inside > 1:
        told.append(f"{fast} {chip.link / 1e9:.0f} GB/s" if chip.link else fast)
    if where.outside > 1:
        told.append(f"{slow} {chip.network / 1e9:.4g} GB/s" if chip.network else slow)
    return ", ".join(told)


def _unravel(index: int, shape: Sequence[int]) -> tuple[int, ...]:
    found: tuple[int, ...] = ()
    for size in reversed(shape):
        index, at = divmod(index, size)
        found = (at, *found)
    return found
