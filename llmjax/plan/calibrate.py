"""What emulated CPU devices reach on this machine, measured once, and the time of a step that follows from it.

Emulated devices share the cores, so a step takes as long as the work of all of them together: what is computed twice
costs twice, and so do the ticks in which a pipeline's stage has nothing to do but computes all the same. A pipeline
also copies what its backward pass needs into arrays of all ticks and out again: without that, steps were foreseen 1.1
to 1.7 times too short.
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
from llmjax.layout import ways
from llmjax.mesh import Axes, Chip, Cluster
from llmjax.models.attention import attention
from llmjax.models.llama import Llama
from llmjax.models.shapes import LAYER
from llmjax.optim.sgd import SGD
from llmjax.plan.analytic import Sent, Time
from llmjax.plan.work import Message, Work
from llmjax.run import Run
from llmjax.train.loss import NextToken
from llmjax.train.program import make

KINDS = ("all-reduce", "all-gather", "collective-permute", "all-to-all")
SMALL, LARGE = 1 << 12, 1 << 21  # bytes of a device between which the cost of a collective is taken to be a line
TURNS = 8  # of a collective in one call


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
    devices, operands = machine.devices, "bfloat16" if run.in_bfloat16("cpu") else "float32"
    ticks, copies = 1 + work.bubble, 2 if sizes.stage > 1 else 1
    products = sum(flops * (ticks if module in LAYER else 1) for module, flops in work.products.items())
    wide = {module: size * (1 if module == "optimizer" else 2) for module, size in work.traffic.items()}
    traffic = sum(size * (ticks * copies if module in LAYER else 1) for module, size in wide.items())
    times = [(message, seconds(message, machine, sizes, run)) for message in work.messages]
    return Time(
        matmul=devices * products / machine.products[operands],
        attention=devices * work.attention * ticks / machine.attention,
        memory=devices * traffic / machine.memory,
        sent=tuple(Sent(message, time, time) for message, time in times),  # cores that send do not compute
        bubble=0.0,
        host=machine.layer * work.passes * ticks,
    )


def seconds(message: Message, machine: Machine, sizes: Axes, run: Run) -> float:
    """Seconds of all runs of a message in a step. A reduce-scatter is an all-reduce on a CPU."""
    lines = machine.collectives[{"reduce-scatter": "all-reduce"}.get(message.kind, message.kind)]
    group = ways(message.axes, sizes)
    line = lines[min(lines, key=lambda n: abs(math.log2(int(n) / group)))]
    wide = 1 if message.hidden and run.in_bfloat16("cpu") else 2  # activations are float32 on a CPU
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


def measure(devices: Sequence[jax.Device], repeats: int = 12) -> Machine:
    """Measures what these emulated devices reach at the same time, in less than a minute. Needs an idle machine."""
    count = len(devices)
    groups = [n for n in (2, 4, 8, 16, 32) if count % n == 0]
    return Machine(
        devices=count,
        products={dtype: products(devices, dtype, repeats) for dtype in ("float32", "bfloat16")},
        attention=scores(devices, repeats),
        memory=traffic(devices, repeats),
        layer=layer(devices, repeats),
        collectives={kind: {str(n): line(devices, kind, n, repeats) for n in groups} for kind in KINDS},
    )


def products(devices: Sequence[jax.Device], dtype: str, repeats: int) -> float:
    """FLOP/s of all devices that multiply at the same time, each its own rows with a weight."""
    rows, width = 1024, 512
    with jax.set_mesh(_mesh(devices)):
        x = jnp.ones((len(devices) * rows, width), dtype, out_sharding=P("data"))
        w = jnp.ones((width, width), dtype)
        product = jax.jit(lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32))
        return 2 * x.shape[0] * width**2 / quick(repeats, product, x, w)


def scores(devices: Sequence[jax.Device], repeats: int) -> float:
    """FLOP/s of attention on all devices, forward and back, as `llmjax.plan.work` counts fused attention."""
    rows, positions, heads, width = 2, 256, 4, 64
    with jax.set_mesh(_mesh(devices)):
        q, k, v = (jnp.ones((len(devices) * rows, positions, heads, width), out_sharding=P("data")) for _ in "qkv")
        both = jax.jit(jax.grad(lambda *qkv: attention(*qkv).sum(), (0, 1, 2)))
        return 2 * q.shape[0] * positions**2 * heads * width * 3.5 / quick(repeats, both, q, k, v)


def traffic(devices: Sequence[jax.Device], repeats: int) -> float:
    """Bytes per second that all devices read and write."""
    with jax.set_mesh(_mesh(devices)):
        x = jnp.ones((len(devices), 1 << 19), out_sharding=P("data"))
        return 2 * x.nbytes / quick(repeats, jax.jit(lambda x: jax.nn.silu(x) * 2), x)


def layer(devices: Sequence[jax.Device], repeats: int) -> float:
    """Seconds that all devices need to pass a layer in which there is next to nothing to do."""
    times = [_tiny_step(devices, layers, repeats) for layers in (2, 10)]
    return max(0.0, times[1] - times[0]) / (3 * 8)


def _tiny_step(devices: Sequence[jax.Device], layers: int, repeats: int) -> float:
    model = Llama(vocab=16, layers=layers, width=8, heads=1, kv_heads=1, head_dim=8, ff=8, positions=8)
    cpu = Cluster("cpu", Chip("cpu", "cpu"), chips=len(devices))
    run = Run(model, None, SGD(), NextToken(), cpu, batch=len(devices), sequence=8, accumulate=1)
    program = make(run, _mesh(devices), cpu.chip)
    with program.context():
        batch = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype, device=x.sharding), program.abstract_batch())
        loss = jax.jit(jax.grad(lambda model: run.loss(model, jax.tree.map(lambda x: x[0], batch))[0]))
        return quick(repeats, loss, program.init(jax.random.key(0)).model)


def line(devices: Sequence[jax.Device], kind: str, group: int, repeats: int) -> Line:
    """The cost of a collective that all devices run at the same time, in groups of neighbours."""
    mesh = Mesh(np.array(devices).reshape(-1, group), ("apart", "together"), axis_types=(AxisType.Explicit,) * 2)
    place, costs = P(("apart", "together")), []
    for size in (SMALL, LARGE):
        once = functools.partial(_once, kind, group)
        several = functools.partial(jax.lax.fori_loop, 0, TURNS, lambda _, x, once=once: once(x))
        with jax.set_mesh(mesh):
            x = jnp.ones(len(devices) * size // (group if kind == "all-gather" else 1) // 4, out_sharding=place)
            call = jax.jit(jax.shard_map(several, in_specs=place, out_specs=place, check_vma=False))
            costs.append(quick(repeats, call, x) / TURNS)
    byte = max(0.0, costs[1] - costs[0]) / (LARGE - SMALL)
    return Line(max(0.0, costs[0] - SMALL * byte), byte)


def _once(kind: str, group: int, x: jax.Array) -> jax.Array:
    if kind == "all-reduce":
        return jax.lax.psum(x, "together") / group
    if kind == "all-gather":
        return jax.lax.all_gather(x, "together", tiled=True)[: x.shape[0]]
    if kind == "all-to-all":
        return jax.lax.all_to_all(x, "together", 0, 0, tiled=True)
    return jax.lax.ppermute(x, "together", [(i, (i + 1) % group) for i in range(group)])


def quick(repeats: int, call: Callable, *arguments) -> float:
    """Seconds of a call: the median of the faster half of several."""
    jax.block_until_ready(call(*arguments))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        times.append(time.perf_counter() - began)
    return statistics.median(sorted(times)[: max(1, repeats // 2)])


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
    return meshes.device_mesh(Axes(len(devices), 1, 1, 1, 1, 1), list(devices))
