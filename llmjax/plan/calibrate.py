"""What emulated CPU devices reach on this machine, measured once, and the time of a step that follows from it.

Emulated devices share the cores, so a step takes as long as the work of all of them together: what is computed twice
costs twice, and so do the ticks in which a pipeline's stage has nothing to do but computes all the same.
"""

import dataclasses
import functools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.sharding import AxisType, Mesh

from llmjax import mesh as meshes
from llmjax.errors import DATA, Refused
from llmjax.mesh import Axes
from llmjax.models.attention import attention
from llmjax.models.shapes import LAYER
from llmjax.plan.analytic import Time
from llmjax.plan.work import Message, Work, ways
from llmjax.run import Run

KINDS = ("all-reduce", "all-gather", "collective-permute", "all-to-all")
SMALL, LARGE = 1 << 12, 1 << 21  # bytes of a device between which the cost of a collective is taken to be a line


@dataclasses.dataclass(frozen=True)
class Line:
    """Seconds of one collective that all devices take part in, in groups of some size."""

    start: float
    "However little is sent."
    byte: float
    "More for every byte V of a device."


@dataclasses.dataclass(frozen=True)
class Machine:
    """What all emulated devices of a machine reach together."""

    devices: int
    products: dict[str, float]
    "FLOP/s of products with weights, by the type of their operands."
    attention: float
    "FLOP/s of attention, forward and back with its softmax, counting the causal triangle."
    memory: float
    "Bytes per second of what is no product."
    layer: float
    "Seconds that all devices need to pass a layer, forward or back, however small it is."
    collectives: dict[str, dict[str, Line]]
    "By kind, then by the devices in a group."


def predict(work: Work, machine: Machine, sizes: Axes, run: Run) -> Time:
    """The time of a step on emulated devices. `work` is of fused attention: the triangle, and no scores in memory."""
    devices, operands = machine.devices, "bfloat16" if run.dtype == "bfloat16" else "float32"
    ticks = 1 + work.bubble
    products = sum(flops * (ticks if module in LAYER else 1) for module, flops in work.products.items())
    traffic = 2 * sum(size * (ticks if module in LAYER else 1) for module, size in work.traffic.items())
    exposed: dict[str, float] = {}
    for message in work.messages:
        axes = " x ".join(message.axes)
        exposed[axes] = exposed.get(axes, 0) + seconds(message, machine, sizes, run)
    return Time(
        matmul=devices * products / machine.products[operands],
        attention=devices * work.attention * ticks / machine.attention,
        memory=devices * traffic / machine.memory,
        exposed=exposed,
        bubble=0.0,
        host=machine.layer * work.passes * ticks,
    )


def seconds(message: Message, machine: Machine, sizes: Axes, run: Run) -> float:
    """Seconds of all runs of a message in a step. A reduce-scatter is an all-reduce on a CPU."""
    lines = machine.collectives[{"reduce-scatter": "all-reduce"}.get(message.kind, message.kind)]
    group = ways(message.axes, sizes)
    line = lines[min(lines, key=lambda n: abs(math.log2(int(n) / group)))]
    wide = 1 if message.hidden and run.dtype == "bfloat16" else 2  # activations are float32 on a CPU
    return message.count * (line.start + message.bytes * wide * line.byte)


def file(folder: Path, devices: int) -> Path:
    """Where the measurement of so many devices on this machine is kept, below a folder of runs."""
    words = (platform.machine(), f"{os.cpu_count()}cores", f"{devices}devices", f"jax{jax.__version__}")
    return folder / ".cache" / f"machine_{'_'.join(words)}.json"


@functools.cache
def stored(folder: Path, devices: int) -> Machine:
    """The stored measurement, read once.

    Raises:
      Refused: there is none, or it is not whole.
    """
    path = file(folder, devices)
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        lines = {k: {n: Line(**line) for n, line in each.items()} for k, each in facts["collectives"].items()}
        return Machine(**facts | {"collectives": lines})
    except OSError as error:
        raise Refused(
            f"this machine has not been measured with {devices} emulated devices ({path} is missing): "
            f"run llmjax plan with --mesh of that many, which measures it."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} is no measurement of a machine ({error}): delete it.", DATA) from error


def store(machine: Machine, folder: Path) -> None:
    """Keeps a measurement for `stored`."""
    path = file(folder, machine.devices)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(machine), indent=1) + "\n", encoding="utf-8")


def measure(devices: Sequence[jax.Device]) -> Machine:
    """Measures this machine with so many emulated devices, in about a minute."""
    count = len(devices)
    groups = [n for n in (2, 4, 8, 16, 32) if count % n == 0 and n <= count]
    return Machine(
        devices=count,
        products={dtype: products(devices, dtype) for dtype in ("float32", "bfloat16")},
        attention=scores(devices),
        memory=traffic(devices),
        layer=5e-5 * count,
        collectives={kind: {str(n): line(devices, kind, n) for n in groups} for kind in KINDS},
    )


def products(devices: Sequence[jax.Device], dtype: str, rows: int = 1024, width: int = 512) -> float:
    """FLOP/s of all devices that multiply at the same time, each its own rows with a weight."""
    mesh = Mesh(np.array(devices), ("all",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jnp.ones((len(devices) * rows, width), dtype, out_sharding=P("all"))
        w = jnp.ones((width, width), dtype)
        product = jax.jit(lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32))
        return 2 * x.shape[0] * width**2 / best(product, x, w)


def scores(
    devices: Sequence[jax.Device], rows: int = 2, positions: int = 256, heads: int = 4, width: int = 64
) -> float:
    """FLOP/s of attention on all devices, forward and back, as `llmjax.plan.work` counts fused attention."""
    with jax.set_mesh(meshes.device_mesh(Axes(len(devices), 1, 1, 1, 1, 1), list(devices))):
        q, k, v = (jnp.ones((len(devices) * rows, positions, heads, width), out_sharding=P("data")) for _ in "qkv")
        both = jax.jit(jax.grad(lambda *qkv: attention(*qkv).sum(), (0, 1, 2)))
        return 2 * q.shape[0] * positions**2 * heads * width * 3.5 / best(both, q, k, v)


def traffic(devices: Sequence[jax.Device], numbers: int = 1 << 19) -> float:
    """Bytes per second that all devices read and write."""
    mesh = Mesh(np.array(devices), ("all",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jnp.ones((len(devices), numbers), out_sharding=P("all"))
        return 2 * x.nbytes / best(jax.jit(lambda x: jax.nn.silu(x) * 2), x)


def line(devices: Sequence[jax.Device], kind: str, group: int) -> Line:
    """The cost of a collective that all devices run at the same time, in groups of neighbours."""
    mesh = Mesh(np.array(devices).reshape(-1, group), ("apart", "together"), axis_types=(AxisType.Explicit,) * 2)

    def once(x):
        ring = [(i, (i + 1) % group) for i in range(group)]
        if kind == "all-reduce":
            return jax.lax.psum(x, "together") / group
        if kind == "all-gather":
            return jax.lax.all_gather(x, "together", tiled=True)[: x.shape[0]]
        if kind == "all-to-all":
            return jax.lax.all_to_all(x, "together", 0, 0, tiled=True)
        return jax.lax.ppermute(x, "together", ring)

    def several(x, turns=8):
        return jax.lax.fori_loop(0, turns, lambda _, x: once(x), x) if turns > 1 else once(x)

    costs = []
    for size in (SMALL, LARGE):
        whole = size // (group if kind == "all-gather" else 1) // 4
        with jax.set_mesh(mesh):
            x = jnp.ones(len(devices) * whole, out_sharding=P(("apart", "together")))
            places = P(("apart", "together"))
            call = jax.jit(jax.shard_map(several, in_specs=places, out_specs=places, check_vma=False))
            costs.append(best(call, x) / 8)
    byte = max(0.0, costs[1] - costs[0]) / (LARGE - SMALL)
    return Line(max(0.0, costs[0] - SMALL * byte), byte)


def best(call: Callable, *arguments, repeats: int = 12) -> float:
    """The median of the faster half of several calls, in seconds."""
    jax.block_until_ready(call(*arguments))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        times.append(time.perf_counter() - began)
    return statistics.median(sorted(times)[: repeats // 2])
