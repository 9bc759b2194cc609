"""Layers in stages: microbatches pass from stage to stage, one tick at a time.

Each of S stages keeps a part of the layers, and N microbatches pass through them (arXiv:1811.06965). In every tick all
stages compute at once, each another microbatch, and hand the result to the next one; where a stage has none, it idles
(in truth it computes something that is not used). Three stages, four microbatches, F3 is the forward of microbatch 3,
B3 its backward:

    gpipe: all forward, then, by differentiating that, all backward. N + S - 1 ticks each way.

        tick      0   1   2   3   4   5  |  6   7   8   9  10  11
        stage 0  F0  F1  F2  F3          |          B3  B2  B1  B0
        stage 1      F0  F1  F2  F3      |      B3  B2  B1  B0
        stage 2          F0  F1  F2  F3  |  B3  B2  B1  B0

    circular: a stage holds R groups of layers that are not neighbours, and microbatches go round R times; a tick is
    R times shorter than gpipe's (arXiv:2104.04473, section 2.2). R N + S - 1 ticks each way. With R = 2, f in lap 1:

        tick      0   1   2   3   4   5   6   7   8   9
        stage 0  F0  F1  F2  F3  f0  f1  f2  f3
        stage 1      F0  F1  F2  F3  f0  f1  f2  f3
        stage 2          F0  F1  F2  F3  f0  f1  f2  f3

    1f1b: a microbatch turns back at the last stage in the very tick in which it arrives (arXiv:1806.03377,
    arXiv:2104.04473). S - 1 ticks with a forward, N with a forward and a backward, S - 1 with a backward:

        tick      0   1     2      3      4      5     6   7
        stage 0  F0  F1  F2     F3     ·  B0  ·  B1   B2  B3
        stage 1      F0  F1     F2 B0  F3 B1  ·  B2   B3
        stage 2          F0 B0  F1 B1  F2 B2  F3 B3

In all three the part of the time that a stage idles is (S - 1) / (R N + S - 1), R = 1 but for circular. They differ in
what is kept for the backward pass: gpipe and circular keep what all N microbatches left on a stage, 1f1b the input of
at most 2 S - 1, from which it computes the stage again (`llmjax.train.pipeline`).

The circular schedule pays for its shorter idling: layers are stored in their order, cut into S equal parts, whatever
the schedule, so that a checkpoint fits every mesh. Every step deals them out to where they are used, most of a stage's
weights, and their gradients back.

One program runs on all stages, so embedding and head cannot live on the first and the last alone. With the layout `pp`
every stage holds them whole, and computes the head in the time in which it would wait for the last one to do so. With
`pp_vp` their V is cut over the stages as well, weights and optimizer state: gpipe and circular use them so, each stage
its part of the vocabulary; 1f1b gathers them once per step and uses them whole.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import P

from llmjax.layout import Pipeline, axes_of

STAGE = "stage"
Layers = Callable[[Any, jax.Array, jax.Array | None], tuple[jax.Array, Any]]


def ticks(schedule: str, stages: int, microbatches: int, laps: int = 1) -> tuple[int, int, int]:
    """How many ticks have (a forward, a forward and a backward, a backward) of one microbatch on every stage."""
    if schedule == "1f1b":
        return stages - 1, microbatches, stages - 1
    return laps * microbatches + stages - 1, 0, laps * microbatches + stages - 1


def forward_at(tick, stage, microbatches: int, laps: int = 1):
    """(microbatch, lap, whether there is one) of the forward that a stage runs in a tick."""
    turn = tick - stage
    real = (turn >= 0) & (turn < laps * microbatches)
    return turn % microbatches, turn // microbatches % laps, real


def backward_at(tick, stage, stages: int, microbatches: int):
    """(microbatch, whether there is one) of the backward that a stage runs in a tick of 1f1b."""
    turn = tick - 2 * (stages - 1) + stage
    return turn % microbatches, (turn >= 0) & (turn < microbatches)


def axes(how: Pipeline, batch: Iterable[str]) -> tuple[str, ...]:
    """The mesh axes that a stage has to itself: `stage`, and to speak over them but once, those that cut the batch.

    Not `expert`: experts speak over it in every layer.
    """
    return (STAGE, *(axis for axis in batch if how.gather_once and axis in ("data", "fsdp")))


def forward(layers: Layers, blocks: Any, x_BTD: jax.Array, segments_BT: jax.Array | None, how: Pipeline):
    """`layers(blocks, x_BTD, segments_BT)` where the L of `blocks` is cut over stages, with the schedule's forward.

    Returns the stream, and what the layers counted summed over the microbatches, with leading L. Differentiable.
    """
    batch = axes_of(jax.typeof(x_BTD).sharding.spec[0])
    own = axes(how, batch)
    stages, rows = ways(own[:1]), P(None, own[1:])
    N = how.parts(x_BTD.shape[0] // ways(batch), stages)
    laps = how.laps if stages <= N else 1  # fewer would be back before the first stage is through with the lap
    on_stage = jax.shard_map(
        functools.partial(_on_stage, layers, N, laps, own),
        in_specs=(P(STAGE), rows, rows),
        out_specs=(rows, P(STAGE)),
        axis_names={*own},
    )
    segments_NBT = None if segments_BT is None else cut(segments_BT, N)
    x_NBTD, sums = on_stage(whole(deal(blocks, laps), own[1:]), cut(x_BTD, N), segments_NBT)
    return joined(x_NBTD, jax.typeof(x_BTD).sharding.spec), deal(sums, laps, back=True)


def _on_stage(layers, N, laps, own, blocks, x_NBTD, segments_NBT):
    stage, stages = jax.lax.axis_index(STAGE), jax.lax.axis_size(STAGE)
    x_NBTD, segments_NBT = jax.lax.pcast((x_NBTD, segments_NBT), STAGE, to="varying")
    # Their gradients add up over the ticks, and so in float32.
    blocks = jax.tree.map(lambda x: x.astype(jnp.float32), blocks)
    blocks_RL = jax.tree.map(lambda x: _groups(x, laps), jax.lax.pcast(blocks, own[1:], to="varying"))
    run = functools.partial(_lap if laps > 1 else _only_lap, layers)

    def tick(carry, t):
        x_NBTD, inbox_BTD = carry  # what goes into a lap, and takes what came out of the last
        back = (t - stages) % N
        x_NBTD = put(x_NBTD, jnp.where(t < stages, x_NBTD[back], inbox_BTD), back)
        n, lap, _ = forward_at(t, stage, N, laps)
        x_BTD = jnp.where(stage == 0, x_NBTD[n], inbox_BTD)
        x_BTD, sums_L = run(blocks_RL, lap, x_BTD, at(segments_NBT, n))
        return (x_NBTD, shift(x_BTD, 1)), sums_L

    forwards, *_ = ticks("circular", stages, N, laps)  # gpipe's with one lap
    (x_NBTD, inbox_BTD), sums_UL = jax.lax.scan(tick, (x_NBTD, x_NBTD[0]), jnp.arange(forwards))
    x_NBTD = jnp.where(stage == 0, put(x_NBTD, inbox_BTD, N - 1), 0)

    def counted(x_UL):  # one sum per tick, of which a stage's own are in a row
        x_RNL = jax.lax.dynamic_slice_in_dim(x_UL, stage, laps * N).reshape(laps, N, *x_UL.shape[1:])
        x_RL = jnp.sum(x_RNL, 1)
        return jax.lax.psum(x_RL.reshape(-1, *x_RL.shape[2:]), own[1:])

    return jax.lax.psum(x_NBTD, STAGE), jax.tree.map(counted, sums_UL)


def _only_lap(layers, blocks_RL, _, x_BTD, segments_BT):
    return layers(at(blocks_RL, 0), x_BTD, segments_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lap(layers, blocks_RL, lap, x_BTD, segments_BT):
    return layers(at(blocks_RL, lap), x_BTD, segments_BT)


def _lap_forward(layers, blocks_RL, lap, x_BTD, segments_BT):
    results, slopes = jax.vjp(lambda blocks, x: layers(blocks, x, segments_BT), at(blocks_RL, lap), x_BTD)
    slopes.args_res[0] = None  # the lap's weights: every tick would keep a copy, where a slice again costs nothing
    return results, (slopes, blocks_RL, lap)


def _lap_backward(layers, saved, cotangents):
    slopes, blocks_RL, lap = saved
    slopes.args_res[0] = at(blocks_RL, lap)
    into_lap, into_x = slopes(cotangents)
    into_blocks = jax.tree.map(lambda x_RL, x_L: put(jnp.zeros_like(x_RL), x_L, lap), blocks_RL, into_lap)
    return into_blocks, None, into_x, None


_lap.defvjp(_lap_forward, _lap_backward)


def ways(axes: Iterable[str]) -> int:
    """Into how many parts these mesh axes cut."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def cut(x_B: jax.Array, N: int) -> jax.Array:
    """[B, ...] as [N, B/N, ...] with every row on the device that has it."""
    batch, *rest = jax.typeof(x_B).sharding.spec
    x_BN = jnp.reshape(x_B, (-1, N, *x_B.shape[1:]), out_sharding=P(batch, None, *rest))
    return jnp.swapaxes(x_BN, 0, 1)


def joined(x_NB: jax.Array, place: P) -> jax.Array:
    """The inverse of `cut`."""
    return jnp.reshape(jnp.swapaxes(x_NB, 0, 1), (-1, *x_NB.shape[2:]), out_sharding=place)


def whole(tree: Any, axes: Iterable[str]) -> Any:
    """The arrays gathered over these mesh axes."""

    def gathered(x):
        kept = (tuple(a for a in axes_of(entry) if a not in axes) for entry in jax.typeof(x).sharding.spec)
        return jax.reshard(x, P(*(entry or None for entry in kept)))

    return jax.tree.map(gathered, tree)


def at(tree: Any, i) -> Any:
    """Entry i of every array."""
    return jax.tree.map(lambda x: x[i], tree)


def shift(tree: Any, by: int) -> Any:
    """What the stage `by` before has, around a ring."""
    n = jax.lax.axis_size(STAGE)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, STAGE, [(i, (i + by) % n) for i in range(n)]), tree)


def deal(tree: Any, laps: int, back: bool = False) -> Any:
    """Arrays with a leading L, stored in order, dealt out for `laps` laps: group g of R S goes to stage g mod S.

    R rounds, in each of which every stage sends one group and gets one.
    """
    if laps == 1:
        return tree
    # Manual over all that cuts an array, or jax 0.10 gathers it at the border.
    places = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)
    cutting = {axis for place in jax.tree.leaves(places) for entry in place for axis in axes_of(entry)}
    call = functools.partial(_deal, laps, back)
    return jax.shard_map(call, in_specs=(places,), out_specs=places, axis_names={STAGE, *cutting})(tree)


def _deal(laps, back, tree):
    stage, rounds = jax.lax.axis_index(STAGE), deals(jax.lax.axis_size(STAGE), laps)

    def dealt(x):
        x_RL = _groups(x, laps)
        y_RL = jnp.zeros_like(x_RL)
        for moves in rounds:
            moves = [((to, into), (by, at)) if back else ((by, at), (to, into)) for (by, at), (to, into) in moves]
            gives, takes = (jnp.array([slot for _, slot in sorted(side)]) for side in zip(*moves, strict=True))
            x_L = jax.lax.ppermute(x_RL[gives[stage]], STAGE, [(by, to) for (by, _), (to, _) in moves])
            y_RL = put(y_RL, x_L, takes[stage])
        return y_RL.reshape(x.shape)

    return jax.tree.map(dealt, tree)


def deals(stages: int, laps: int) -> list[list[tuple[tuple[int, int], tuple[int, int]]]]:
    """For every round the moves ((stage, slot), (stage, slot)) of one group from each stage to each stage.

    Stage s has groups s R to s R + R - 1. With d = gcd(R, S), the stages of one d-th of all have s R mod S different
    from each other and d apart; the d-ths are told apart by which slot they deal.
    """
    share = stages // math.gcd(laps, stages)
    rounds = [[(s, (c + s // share) % laps) for s in range(stages)] for c in range(laps)]
    return [[((s, i), ((s * laps + i) % stages, (s * laps + i) // stages)) for s, i in moves] for moves in rounds]


def _groups(x_L, laps):
    return x_L.reshape(laps, -1, *x_L.shape[1:])


def put(x_N: jax.Array, x: jax.Array, n) -> jax.Array:
    """The array with x as its entry n."""
    return jax.lax.dynamic_update_index_in_dim(x_N, x, n, 0)
