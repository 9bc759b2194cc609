"""Local SGD: workers train alone, exchange what they changed, and little crosses the axis between them."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from llmjax import cli
from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import Checkpoints, like, named
from llmjax.commands.train import restore
from llmjax.data.dataset import Synthetic
from llmjax.errors import Refused
from llmjax.mesh import Axes
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import Constant
from llmjax.optim.sgd import SGD
from llmjax.run import DiLoCo, Run, check
from llmjax.train import diloco
from llmjax.train import step as steps
from llmjax.train.loss import NextToken
from llmjax.train.program import Program, make
from meshes import chips, cpu8

TINY = Run(
    model=Llama(vocab=64, layers=4, width=32, heads=4, kv_heads=4, head_dim=8, ff=64, positions=16),
    data=Synthetic(vocab=64),
    optimizer=AdamW(lr=3e-3),
    loss=NextToken(),
    mesh=cpu8.cluster,
    axes=Axes(2, 1, 2, 1, 1, 2),
    layout=layouts.fsdp_tp,
    steps=10,
    batch=8,
    sequence=16,
    accumulate=1,
    name="tiny",
)
TWO = Axes(2, 1, 1, 1, 1, 1)
EVERY_4 = dataclasses.replace(TINY, local=DiLoCo(every=4))
STREAMED = dataclasses.replace(TINY, local=DiLoCo(every=4, fragments=2))


@functools.cache
def program(run: Run) -> Program:
    devices = int(np.prod(run.axes.sizes()))
    return make(run, meshes.device_mesh(run.axes, jax.devices()[:devices]), chips.CPU)


def batch(program: Program, step: int):
    """Rows in which most tokens follow from the one before."""
    random, rows = np.random.default_rng(step), []
    for t in range(17):
        rows.append(random.integers(0, 64, 8) if t == 0 else (5 * rows[-1] + 3 + (random.random(8) < 0.1)) % 64)
    rows = np.stack(rows, 1).astype(np.int32)[None]
    parts = dict(tokens=rows[..., :-1], targets=rows[..., 1:], weights=np.ones((1, 8, 16), np.float32))
    return jax.device_put(parts, program.batch_sharding())


def train(program: Program, state, start: int, stop: int):
    """(state, losses, each the mean over workers)."""
    losses = []
    with program.context():
        for step in range(start, stop):
            state, metrics = program.step(state, batch(program, step))
            losses.append(diloco.mean(metrics, "loss"))
    return state, losses


def start(program: Program):
    with program.context():
        return program.init(jax.random.key(0))


def numbers(tree) -> dict[str, np.ndarray]:
    return {name: np.array(x) for name, x in named(tree).items()}


@functools.cache
def compiled(run: Run) -> str:
    """HLO of the step of a run."""
    with program(run).context():
        return program(run).step.lower(program(run).abstract_state(), program(run).abstract_batch()).compile().as_text()


@functools.cache
def compiled_exchange(run: Run) -> str:
    """HLO of an exchange of everything."""
    whole = diloco.fragments(program(run).abstract_state().model, 1)[0]
    with program(run).context():
        return jax.jit(diloco.exchange, static_argnums=(1, 2)).lower(state, whole, run.local).compile().as_text()


SIZES = dict(f32=4, s32=4, u32=4, bf16=2, u16=2, s8=1, u8=1, pred=1)
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def crossing(hlo: str, run: Run) -> list[tuple[str, str, float]]:
    """(computation, dtype, bytes that a device sends) of every collective whose devices differ in their worker."""
    found, computation = [], ""
    ids = np.arange(np.prod(run.axes.sizes())).reshape(run.axes.sizes())
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.removeprefix("ENTRY ").split()[0]
        if not (op := re.search(rf" = (.*?) ({KINDS})(-start)?\(", line)):
            continue
        n = max(len({int(np.argwhere(ids == i)[0][0]) for i in group}) for group in groups_of(line))
        if n == 1:
            continue
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1, "reduce-scatter": n - 1}.get(
            op[2], (n - 1) / n
        )
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", op[1]):
            found.append((computation, dtype, share * SIZES[dtype] * np.prod([int(d) for d in shape.split(",") if d])))
    return found


def groups_of(line: str) -> list[list[int]]:
    """The devices that a collective joins, in any of HLO's notations."""
    if explicit := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", line):
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", explicit[1])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims, order = ([int(i) for i in part.split(",")] if part else None for part in iota.groups())
        return np.arange(np.prod(dims)).reshape(dims).transpose(order).reshape(shape).tolist()
    [(axes, joined)] = re.findall(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", line)
    names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", axes), strict=True)
    over = [names.index(name) for name in re.findall(r"'(\w+)'", joined)]
    ids = np.moveaxis(
        np.arange(np.prod([int(s) for s in sizes])).reshape([int(s) for s in sizes]), over, range(len(over))
    )
    return ids.reshape(np.prod(ids.shape[: len(over)]), -1).T.tolist()
