"""Continuing a text: keys and values of earlier tokens are kept, so that a new token passes the layers alone.

This is so for every `nn.Decoder`: what its attention asks for while it is traced says what has to be kept. A cache lies
over the mesh as keys do: rows as the batch, heads as heads. Its position dim S is a ring: position p lies in slot
p mod S. Where attention looks back all the way, S is the longest text; in a window, the window and the tokens that come
in at once, so no token overwrites what one beside it still sees.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from llmjax.layout import Layout, axes_of
from llmjax.models import memory, nn, pipeline, scores
from llmjax.models.scores import Scores


class Parts(NamedTuple):
    """A model as a text is continued with it, token by token, every one of which reads all its weights."""

    ends: nn.Decoder
    "The model without its layers."
    stacks: tuple[nnx.Module, ...]
    "Its layers, every parameter with a leading L, which tokens pass one stack after another."


class Kept(NamedTuple):
    """What one attention keeps in every turn of a stack; without values, where these are the keys."""

    keys_LBGSK: jax.Array
    values_LBGSK: jax.Array | None


Cache = tuple[tuple[Kept, ...], ...]  # of every stack, in the order in which attention is asked in a turn


def whole_sequences(layout: Layout) -> Layout:
    """The layout with positions on every device: a single token cannot be cut."""

    def without(placement):
        return {d: axes for d, axes in placement.items() if d not in "TS"}

    return dataclasses.replace(layout, stream=without(layout.stream), inner=without(layout.inner))


@jax.jit
def parts(model: nn.Decoder) -> Parts:
    """The model's weights as products need them, so that no token has to cast them.

    Where the loop over layers has one turn (`nn.Compute.unroll`), the layers are taken apart as well: out of a stack,
    each would be copied for every token. What is neither cast nor taken apart is not copied here.
    """
    model = jax.tree_util.tree_map_with_path(_cast, model)
    stacks = []
    for name in ("first", "blocks"):
        if (blocks := getattr(model, name, None)) is not None:
            turns = _turns(blocks)
            apart = nn.how().unroll >= turns and (nn.stages() == 1 or name == "first")
            stacks += [jax.tree.map(lambda x: x[i : i + 1], blocks) for i in range(turns)] if apart else [blocks]  # noqa: B023
            setattr(model, name, None)
    return Parts(model, tuple(stacks))


def _cast(path, weight: jax.Array) -> jax.Array:
    """A matrix as products use it; routers choose in float32, and eight bits are made of that."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    used = len(nn.dims_of(path)) > 1 and "router" not in name and not nn.how().rounding
    return weight.astype(nn.how().operands) if used else weight


def _turns(blocks: nnx.Module) -> int:
    return len(jax.tree.leaves(blocks)[0])


def empty(model: Parts, rows: int, length: int, width: int) -> Cache:
    """A cache for texts of up to `length` positions, to which up to `width` tokens come at once."""

    def kept(blocks, asked: "_Asked") -> Kept:
        longest = min(length, asked.window + width - 1) if asked.window else length
        return Kept(*(x and _zeros(blocks, x, longest) for x in (asked.key, asked.value)))

    return tuple(tuple(kept(blocks, asked) for asked in _ask(model.ends, blocks, rows)) for blocks in model.stacks)


def extend(
    model: Parts, tokens_BT: jax.Array, start_B: jax.Array, count_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """(the stream [B, T, D] after the last layer, the cache with these tokens).

    Tokens follow on those in the cache, from position `start_B`; a row's first `count_B` are its own, others padding.
    """
    T, place = tokens_BT.shape[1], nn.how().layout.gathered("BT")
    start_B1, count_B1 = (jax.reshard(x[:, None], P(place[0], None)) for x in (start_B, count_B))
    where = start_B1 + jnp.arange(T)[None], count_B1
    with memory.remembering(_Remembering(*where, (), 0)):
        x_BTD = model.ends.embed(tokens_BT)
    kept = []
    for blocks, before in zip(model.stacks, cache, strict=True):
        run = _in_stages if _stages(blocks) else _pass
        x_BTD, after = run(model.ends.layer, blocks, before, x_BTD, *where)
        kept.append(after)
    return x_BTD, tuple(kept)


def _pass(layer, blocks, kept, x_BTD, positions_BT, count_B1):
    """(the stream after a stack of layers, what is kept)."""

    def turn(carry, of_turn):
        (x_BTD, kept), (block, number) = carry, of_turn
        with memory.remembering(remembered := _Remembering(positions_BT, count_B1, kept, number)):
            x_BTD, _ = nn.turn(layer, block, x_BTD, None)
        return (x_BTD, tuple(remembered.kept)), None

    if (turns := _turns(blocks)) == 1:
        return turn((x_BTD, kept), (jax.tree.map(lambda x: x[0], blocks), 0))[0]
    return jax.lax.scan(turn, (x_BTD, kept), (blocks, jnp.arange(turns)), unroll=min(nn.how().unroll, turns))[0]


def _stages(blocks) -> bool:
    """Whether the layers are cut over stages."""
    return pipeline.STAGE in axes_of(jax.typeof(jax.tree.leaves(blocks)[0]).sharding.spec[0])


def _in_stages(layer, blocks, kept, x_BTD, positions_BT, count_B1):
    """The same where the layers are cut over stages, each of which keeps its own: all compute, and in each tick the one
    whose turn it is has what the one before it made.
    """

    def on_stage(blocks, kept, x_BTD, positions_BT, count_B1):
        stage = jax.lax.axis_index(pipeline.STAGE)

        def tick(carry, now):
            x_BTD, kept = carry
            mine_B1 = jnp.where(stage == now, count_B1, 0)  # the others keep nothing of it
            here = varying(x_BTD), varying(positions_BT), mine_B1
            y_BTD, kept = nn.inside((pipeline.STAGE,), _pass, layer, blocks, kept, *here)
            return (jax.lax.psum(jnp.where(stage == now, y_BTD, 0), pipeline.STAGE), kept), None

        return jax.lax.scan(tick, (x_BTD, kept), jnp.arange(jax.lax.axis_size(pipeline.STAGE)))[0]

    varying = functools.partial(jax.lax.pcast, axis_name=pipeline.STAGE, to="varying")
    cut = P(pipeline.STAGE)
    call = jax.shard_map(
        on_stage, in_specs=(cut, cut, P(), P(), P()), out_specs=(P(), cut), axis_names={pipeline.STAGE}
    )
    return call(blocks, kept, x_BTD, positions_BT, count_B1)


class _Asked(NamedTuple):
    """What an attention wants kept: abstract keys and values [B, T, G, K], and how far back it looks."""

    key: Any
    value: Any
    window: int


class _Asking:
    """A memory that notes what attention asks, of a trace whose numbers nobody needs."""

    def __init__(self, positions_BT: jax.Array):
        self.positions_BT, self.asked = positions_BT, []

    def attend(self, kind, q_BTHK, k_BTGK, v_BTGK, sinks_H):
        self.asked.append(_Asked(jax.typeof(k_BTGK), v_BTGK if v_BTGK is None else jax.typeof(v_BTGK), kind.window))
        shape = *q_BTHK.shape[:3], (k_BTGK if v_BTGK is None else v_BTGK).shape[-1]
        return jnp.zeros(shape, q_BTHK.dtype, out_sharding=jax.typeof(q_BTHK).sharding)


def _ask(model, blocks, rows: int) -> list[_Asked]:
    """What the attention of one turn wants kept, in the order in which it asks."""
    noted = []

    def turn(model, blocks):
        tokens_BT = jnp.zeros((rows, 1), jnp.int32, out_sharding=nn.how().layout.gathered("BT"))
        with memory.remembering(asking := _Asking(tokens_BT)):
            block = jax.tree.map(lambda x: jax.reshard(x, P(None, *jax.typeof(x).sharding.spec[1:]))[0], blocks)
            nn.turn(model.layer, block, model.embed(tokens_BT), None)
        noted.extend(asking.asked)

    jax.eval_shape(turn, model, blocks)
    return noted


def _zeros(blocks, like: Any, longest: int) -> jax.Array:
    """Room for keys or values: what products round them to is all that is kept of them."""
    (B, _, G, K), (rows, _, heads, _) = like.shape, like.sharding.spec
    place = P(pipeline.STAGE if _stages(blocks) else None, rows, heads, None, None)
    return jnp.zeros((_turns(blocks), B, G, longest, K), nn.how().operands, out_sharding=place)


class _Remembering:
    """The memory of one turn, number `turn`: reads and writes what is kept, each attention its own."""

    def __init__(self, positions_BT: jax.Array, count_B1: jax.Array, kept: tuple[Kept, ...], turn: jax.Array):
        self.positions_BT, self.count_B1, self.turn = positions_BT, count_B1, turn
        self.kept, self.asked = list(kept), 0

    def attend(self, kind, q_BTHK, k_BTGK, v_BTGK, sinks_H):
        before, place = self.kept[self.asked], nn.how().layout.gathered("BTHK")
        places = place, jax.tree.map(lambda x: jax.typeof(x).sharding.spec, before)
        call = jax.shard_map(functools.partial(_attend, kind), out_specs=places, axis_names=nn.unclaimed())
        new = Kept(k_BTGK, v_BTGK)
        o_BTHK, self.kept[self.asked] = call(self.turn, self.positions_BT, self.count_B1, before, new, q_BTHK, sinks_H)
        self.asked += 1
        return o_BTHK


def _attend(kind: Scores, turn, position_BT, count_B1, before: Kept, new: Kept, q_BTHK, sinks_H):
    """(what these queries find, what is kept with the new keys) on one device."""
    kept = jax.tree.map(functools.partial(_written, turn, position_BT, count_B1), before, new)
    k_BGSK, v_BGSK = (
        kept.keys_LBGSK[turn],
        (kept.values_LBGSK if new.values_LBGSK is not None else kept.keys_LBGSK)[turn],
    )
    (B, T, H, K), (G, S) = q_BTHK.shape, k_BGSK.shape[1:3]
    q_BGRTK = jnp.moveaxis((q_BTHK * K**-0.5).astype(k_BGSK.dtype).reshape(B, T, G, H // G, K), 1, 3)
    score_BGRTS = jnp.einsum("BGRTK,BGSK->BGRTS", q_BGRTK, k_BGSK, preferred_element_type=jnp.float32)
    far_BTS = (position_BT[..., None] - jnp.arange(S)[None, None]) % S
    seen_BTS = far_BTS <= position_BT[..., None]
    if kind.window:
        seen_BTS &= far_BTS < kind.window
    score_BGRTS = jnp.where(seen_BTS[:, None, None], scores.capped(kind.cap, score_BGRTS), scores.HIDDEN)
    highest_BGRT1 = jnp.max(score_BGRTS, -1, keepdims=True)
    weight_BGRTS = jnp.exp(score_BGRTS - highest_BGRT1)
    total_BGRT1 = jnp.sum(weight_BGRTS, -1, keepdims=True)
    o_BGRTK = jnp.einsum(
        "BGRTS,BGSK->BGRTK", weight_BGRTS.astype(v_BGSK.dtype), v_BGSK, preferred_element_type=jnp.float32
    )
    o_BTGRK = jnp.moveaxis(o_BGRTK / total_BGRT1, 3, 1).astype(q_BTHK.dtype)
    log_total_BTGR = jnp.moveaxis((highest_BGRT1 + jnp.log(total_BGRT1))[..., 0], 3, 1)
    sinks_GR = None if sinks_H is None else sinks_H.reshape(G, H // G)
    o_BTGRK, _ = scores.sunk(o_BTGRK, log_total_BTGR, sinks_GR)
    return o_BTGRK.reshape(B, T, H, -1), kept


def _written(turn, position_BT, count_B1, kept_LBGSK, new_BTGK):
    """What is kept, with new keys or values in the slots of their positions."""
    (B, T), S = position_BT.shape, kept_LBGSK.shape[3]
    new_BTGK = new_BTGK.astype(kept_LBGSK.dtype)
    if T == 1:
        slot_B = jnp.where(count_B1[:, 0] > 0, position_BT[:, 0] % S, S)
        return kept_LBGSK.at[turn, jnp.arange(B), :, slot_B].set(new_BTGK[:, 0], mode="drop")
    which_BS = (jnp.arange(S)[None] - position_BT[:, :1]) % S  # of the new ones, if so many there are
    own_BSGK = jnp.take_along_axis(new_BTGK, jnp.minimum(which_BS, T - 1)[..., None, None], 1)
    own_BGSK = jnp.moveaxis(own_BSGK, 1, 2)
    layer_BGSK = jnp.where((which_BS < count_B1)[:, None, :, None], own_BGSK, kept_LBGSK[turn])
    return jax.lax.dynamic_update_index_in_dim(kept_LBGSK, layer_BGSK, turn, 0)
