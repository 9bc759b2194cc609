"""1F1B: forward and backward of different microbatches in one tick, placed by hand.

Differentiating a loop gives all of its forward before any of its backward, so the memory of GPipe grows with the number
of microbatches. Here the loop holds both (`llmjax.models.pipeline` draws it): a stage keeps the inputs of the at most
2 S - 1 microbatches that it has yet to see again, computes itself again from them, and adds up its own gradients.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from llmjax.layout import axes_of
from llmjax.models import nn
from llmjax.models.pipeline import STAGE, axes, backward_at, cut, forward_at, put, shift, ticks, ways, whole
from llmjax.train import pieces


def by_hand() -> bool:
    """Whether the backward pass is placed by hand: the schedule is 1f1b and there is more than one stage."""
    return nn.stages() > 1 and nn.how().pipeline.schedule == "1f1b"


def value_and_grad(loss: Callable) -> Callable:
    """What `jax.value_and_grad(loss, has_aux=True)` is, ((total, sums), gradients) of (model, batch), through 1F1B.

    The model is an `nn.Decoder`, and the loss has `of(logits_BTV, batch)` and, if layers count what it looks at,
    `of_layers(counted)`, which is linear. Embedding, head and loss are computed on every stage with whole weights, and
    what they give is used on the first and the last: the others would wait.
    """

    def call(model, batch):
        place = nn.how().layout.gathered("BT")
        own = axes(nn.how().pipeline, axes_of(place[0]))
        batch = jax.tree.map(nn.in_order, batch)
        N = nn.how().pipeline.parts(batch["tokens"].shape[0] // ways(axes_of(place[0])), nn.stages())
        on_stage = jax.shard_map(
            functools.partial(nn.inside, own, functools.partial(_on_stage, loss, N, own)),
            in_specs=(P(), P(STAGE), P(None, own[1:])),
            out_specs=(P(), P(STAGE), (P(), P(STAGE))),
            axis_names={*own},
        )
        ends, blocks = _apart(model)
        parts = jax.tree.map(functools.partial(cut, N=N), batch)
        (total, sums), counted, grads = on_stage(whole(ends, own), whole(blocks, own[1:]), parts)
        if counted:
            more, routed = loss.of_layers(counted)
            total, sums = total + more, sums | routed
        return (total, sums), jax.tree.map(lambda g, w: jax.reshard(g, jax.typeof(w).sharding), _joined(*grads), model)

    return call


def _on_stage(loss, N, own, ends, blocks, batch_N):
    stage, stages = jax.lax.axis_index(STAGE), jax.lax.axis_size(STAGE)
    first, last, kept = stage == 0, stage == stages - 1, 2 * stages - 1
    ends, blocks = jax.tree.map(lambda x: x.astype(jnp.float32), (ends, blocks))  # as their gradients add up
    ends, blocks = jax.lax.pcast(ends, own, to="varying"), jax.lax.pcast(blocks, own[1:], to="varying")
    batch_N = jax.lax.pcast(batch_N, STAGE, to="varying")
    nothing = 0 * sum(map(jax.lax.axis_index, own))  # makes what it is added to vary over all of them

    def batch(n):
        return jax.tree.map(lambda x: x[n], batch_N)

    def embed(n, ends):
        return nn.embedded(ends, batch(n)["tokens"], batch(n).get("segments"))

    def layers(n, blocks, x_BTD):
        x_BTD, counted = nn.layers(ends.layer, blocks, x_BTD, batch(n).get("segments"))
        if not hasattr(loss, "of_layers"):
            return x_BTD, None
        return x_BTD, jax.tree.map(lambda x: x + nothing.astype(x.dtype), counted)

    def head(n, ends, x_BTD):
        return pieces.of_stream(loss.of, ends, x_BTD, batch(n))

    def forward(inbox_BTD, kept_NBTD, t):
        n, *_ = forward_at(t, stage, N)
        x_BTD = jnp.where(first, embed(n, ends), inbox_BTD)
        return layers(n, blocks, x_BTD)[0], put(
            kept_NBTD, x_BTD, (t - stage) % kept
        )  # n % kept, or a slot that is free

    def backward(cotangent_BTD, kept_NBTD, total, t):
        n, real = backward_at(t, stage, stages, N)
        (_, counted), slopes = jax.vjp(functools.partial(layers, n), blocks, kept_NBTD[n % kept])
        into_counted = None if counted is None else jax.grad(lambda counted: loss.of_layers(counted)[0])(counted)
        only = functools.partial(jax.tree.map, lambda x: jnp.where(real, x, 0))
        into_blocks, cotangent_BTD = slopes(only((cotangent_BTD, into_counted)))
        _, slope = jax.vjp(functools.partial(embed, n), ends)
        (into_ends,) = slope(jnp.where(first, cotangent_BTD, 0))
        return cotangent_BTD, jax.tree.map(jnp.add, total, ((into_ends, into_blocks), only(counted)))

    def filling(carry, t):
        inbox_BTD, back_BTD, kept_NBTD, total = carry
        x_BTD, kept_NBTD = forward(inbox_BTD, kept_NBTD, t)
        return (shift(x_BTD, 1), back_BTD, kept_NBTD, total), None

    def steady(carry, t):
        inbox_BTD, back_BTD, kept_NBTD, ((into_ends, into_blocks), counted) = carry
        x_BTD, kept_NBTD = forward(inbox_BTD, kept_NBTD, t)
        n, *_ = forward_at(t, stage, N)
        nats, slopes, sums = jax.vjp(functools.partial(head, n), ends, x_BTD, has_aux=True)
        more, turned_BTD = slopes(jnp.where(last, jnp.ones_like(nats), 0))
        total = (jax.tree.map(jnp.add, into_ends, more), into_blocks), counted
        back_BTD, total = backward(jnp.where(last, turned_BTD, back_BTD), kept_NBTD, total, t)
        return (shift(x_BTD, 1), shift(back_BTD, -1), kept_NBTD, total), (nats, sums)

    def draining(carry, t):
        inbox_BTD, back_BTD, kept_NBTD, total = carry
        back_BTD, total = backward(back_BTD, kept_NBTD, total, t)
        return (inbox_BTD, shift(back_BTD, -1), kept_NBTD, total), None

    x_BTD = jnp.zeros_like(embed(0, ends))
    kept_NBTD = jnp.broadcast_to(x_BTD[None], (kept, *x_BTD.shape))
    zero = jax.tree.map(jnp.zeros_like, ((ends, blocks), layers(0, blocks, x_BTD)[1]))
    carry, t, results = (x_BTD, x_BTD, kept_NBTD, zero), 0, None
    for phase, count in zip((filling, steady, draining), ticks("1f1b", stages, N), strict=True):
        carry, found = jax.lax.scan(phase, carry, jnp.arange(t, t + count))
        t, results = t + count, found or results
    results = jax.tree.map(lambda x_N: jax.lax.psum(jnp.where(last, jnp.sum(x_N, 0), 0), own), results)
    (into_ends, into_blocks), counted = carry[-1]
    counted, into_blocks = jax.lax.psum((counted, into_blocks), own[1:])
    return results, counted, (jax.lax.psum(into_ends, own), into_blocks)


def _apart(model: nnx.Module) -> tuple[nnx.Module, nnx.Module]:
    """(all but the layers, the layers)."""
    ends = jax.tree.map(lambda x: x, model)  # a copy
    ends.blocks = None
    return ends, model.blocks


def _joined(ends: nnx.Module, blocks: nnx.Module) -> nnx.Module:
    model = jax.tree.map(lambda x: x, ends)
    model.blocks = blocks
    return model
