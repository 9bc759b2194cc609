"""Mixtures of experts: the way of tokens to the experts they chose, and back.

J counts the experts that a token chooses, I the tokens on one device, M the rows that are handed to experts.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from llmjax.layout import axes_of
from llmjax.models import nn
from llmjax.models.routers import Choice, hits

SLACK = 1.25  # a round of the dropless dispatch takes so many times what evenly loaded devices would get


Gated = Callable[[jax.Array, jax.Array], jax.Array]


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) · up (arXiv:2002.05202)."""
    return jax.nn.silu(gate) * up


def mean_bias(choice: Choice, keep_BTJ: jax.Array | None, bias_ED: nnx.Param) -> jax.Array:
    """Σ_j share_j · bias_j over the experts that each token chose, [B, T, D]: what biases of down products add."""
    share_BTJ = choice.share_BTJ if keep_BTJ is None else jnp.where(keep_BTJ, choice.share_BTJ, 0)
    one_BTJE = jax.nn.one_hot(choice.chosen_BTJ, choice.score_BTE.shape[-1])
    share_BTE, whole_ED = jnp.sum(one_BTJE * share_BTJ[..., None], 2), jax.reshard(bias_ED[...], P(None, None))
    y_BTD = jnp.einsum("BTE,ED->BTD", share_BTE, whole_ED, out_sharding=nn.how().layout.gathered("BTD"))
    return jax.reshard(y_BTD, nn.how().layout.activation("BTD")).astype(nn.how().activations)


@jax.named_scope("experts")
def experts(
    x_BTD: jax.Array,
    choice: Choice,
    keep_BTJ: jax.Array | None,
    slots: int,
    weights: tuple[nnx.Param, nnx.Param, nnx.Param],
    biases: tuple[nnx.Param, ...] = (),
    gated: Gated = swiglu,
) -> jax.Array:
    """Σ_j share_j · down_j(silu(gate_j x) · up_j x) over the experts that each token chose, [B, T, D].

    `weights` are gate_EDF, up_EDF and down_EFD; `biases` are none, or gate_bias_EF and up_bias_EF; `gated` is what
    stands between the products in place of silu(gate) · up. Choices that `keep_BTJ` leaves out add nothing; then at
    most `slots` tokens of a sequence go to one expert, and experts multiply buffers of that size (arXiv:2006.16668).
    Where it is None none is dropped, and experts multiply as many rows as chose them (`jax.lax.ragged_dot`,
    arXiv:2211.15841).

    Where experts are cut over mesh axes of n devices in all, tokens travel there and back by all-to-all. Bytes that a
    device sends each way: E·C·D·(n-1)/n per sequence with slots; else SLACK·I·J·D·(n-1)/n per round, in one round
    where load is nearly even and n/SLACK at worst.
    """
    # What the layout says is asked here, as JAX traces backward passes where another one may be in force.
    (B, T), way, stored = nn.how().layout.gathered("BT"), _way(), nn.how().layout.at_rest
    dims = ("EDF", "EDF", "EFD", *(["EF"] * len(biases)))
    places = P(B, T), P(B, axes_of(T) + way.pieces), tuple(map(stored, dims))
    call = functools.partial(_over_mesh, way, gated, places, choice.score_BTE.shape[-1], slots)
    # Inside another manual region, such as a stage's, JAX cannot pass what a nested one saves to the backward pass: it
    # asks for the outer axis as well. There the backward pass computes the region again.
    call = _computed_twice(call) if jax.sharding.get_abstract_mesh().manual_axes else call
    # A shard_map takes no weight whose gradient is to stay open (nn.open_sums): these are summed by every microbatch.
    closed = (nn.at_rest(*each) for each in zip((*weights, *biases), dims, strict=True))
    y_BTD = call((choice.chosen_BTJ, keep_BTJ), (x_BTD, choice.share_BTJ, *closed))
    return jax.reshard(y_BTD, nn.how().layout.activation("BTD"))


def _over_mesh(way, gated, places, experts, slots, where, values, backwards=None):
    """Runs `_on_device`, or, where `backwards` is the cotangent of its result, its vector-Jacobian product."""
    token, result, weights = places
    places = (token, token, *weights)
    call = functools.partial(_on_device, way, gated, experts, slots)
    # Manual over every axis, also those that cut nothing here: jax 0.12 takes no psum_scatter beside explicit axes.
    mesh = jax.sharding.get_abstract_mesh()
    region = functools.partial(jax.shard_map, axis_names={*mesh.axis_names} - {*mesh.manual_axes})
    if backwards is None:
        return region(call, in_specs=(token, places), out_specs=result)(where, values)

    def back(where, values, cotangent):
        return jax.vjp(functools.partial(call, where), values)[1](cotangent)[0]

    return region(back, in_specs=(token, places, result), out_specs=places)(where, values, backwards)


def _computed_twice(call):
    """`call` with a backward pass that keeps nothing of it; `jax.checkpoint` for the reason that `ring` gives."""
    call = jax.checkpoint(call)
    twice = jax.custom_vjp(lambda *inputs: call(*inputs))
    twice.defvjp(lambda *inputs: (call(*inputs), inputs), lambda inputs, cotangent: (None, call(*inputs, cotangent)))
    return twice


class _Way(NamedTuple):
    """The mesh axes over which tokens and weights meet."""

    tokens: tuple[str, ...]  # cut B or T
    experts: tuple[str, ...]  # of those, cut E in use: tokens travel over them
    hidden: tuple[str, ...]  # cut F in use: the result is a sum over them
    pieces: tuple[str, ...]  # of those, cut T between blocks
    gathered: tuple[tuple[str, ...], ...]  # cut E, D and F only where weights are stored

    def gather(self, dims: str) -> list[tuple[int, tuple[str, ...]]]:
        """(dim, axes) for all that a weight with these dims is gathered over."""
        over = dict(zip("EDF", self.gathered, strict=True))
        return [(dim, over[d]) for dim, d in enumerate(dims) if over[d]]


def _way() -> _Way:
    layout = nn.how().layout
    tokens = tuple(axis for d in "BT" for axis in axes_of(layout.inner.get(d)))
    hidden, experts = axes_of(layout.in_use("F")[0]), axes_of(layout.params.get("E"))
    if experts != axes_of(layout.inner.get("E")) or not set(experts) <= set(tokens):
        experts = ()
    inside, between = (axes_of(placement.get("T")) for placement in (layout.inner, layout.stream))
    pieces = between[len(inside) :] if between[: len(inside)] == inside else ()
    stored = (axes_of(layout.params.get(d)) for d in "EDF")
    return _Way(
        tokens=tokens,
        experts=experts,
        hidden=hidden,
        pieces=pieces if set(pieces) <= set(hidden) else (),
        gathered=tuple(tuple(axis for axis in axes if axis not in experts + hidden) for axes in stored),
    )


def _on_device(way, gated, experts, slots, where, values):
    (chosen_BTJ, keep_BTJ), (x_BTD, share_BTJ, gate_EDF, up_EDF, down_EFD, *biases) = where, values
    x_BTD, share_BTJ = jax.lax.pcast((x_BTD, share_BTJ), way.hidden, to="varying")

    def mlp(x, sizes_E):
        gate, up = (_product(way, "EDF", x, weight, sizes_E) for weight in (gate_EDF, up_EDF))
        if biases:
            gate, up = (x + _of_rows(way, b, x, sizes_E) for x, b in zip((gate, up), biases, strict=True))
        return _product(way, "EFD", gated(gate, up), down_EFD, sizes_E)

    if keep_BTJ is not None:
        y_ID = _in_slots(way, mlp, experts, slots, x_BTD, chosen_BTJ, share_BTJ, keep_BTJ)
    elif _size(way.experts) > 1:
        y_ID = _in_rounds(way, mlp, experts, *map(_flat, (x_BTD, chosen_BTJ, share_BTJ)))
    else:
        y_ID = _at_home(mlp, experts, *map(_flat, (x_BTD, chosen_BTJ, share_BTJ)))
    y_BTD = y_ID.astype(x_BTD.dtype).reshape(x_BTD.shape)
    if way.pieces:
        y_BTD = jax.lax.psum_scatter(y_BTD, way.pieces, scatter_dimension=1, tiled=True)
    summed = tuple(axis for axis in way.hidden if axis not in way.pieces)
    return jax.lax.psum(y_BTD, summed) if summed else y_BTD


def _of_rows(way, bias_EF, x, sizes_E):
    """The bias of every row's expert; of padding, that of the last one."""
    bias_EF = _gather(way, "EF", bias_EF).astype(x.dtype)
    if sizes_E is None:
        return bias_EF[:, None]
    return bias_EF[jnp.repeat(jnp.arange(len(bias_EF)), sizes_E, total_repeat_length=len(x))]


def _flat(x_BTZ):
    return x_BTZ.reshape(-1, x_BTZ.shape[-1])


def _size(axes) -> int:
    return math.prod(jax.lax.axis_size(axis) for axis in axes)


def _at_home(mlp, experts, x_ID, chosen_IJ, share_IJ):
    """All experts are here."""
    o_MD = _by_expert(mlp, lambda order_M: x_ID[order_M // chosen_IJ.shape[1]], chosen_IJ.reshape(-1), experts)
    return _weighed(o_MD.reshape(*chosen_IJ.shape, -1), share_IJ)


def _weighed(o_IJD, share_IJ):
    return jnp.sum(o_IJD.astype(jnp.float32) * share_IJ[..., None], 1)


def _by_expert(mlp, rows, expert_M, experts):
    """What the experts make of rows, in the order of `expert_M`; those with the number `experts` are padding."""
    order_M = jnp.argsort(expert_M)
    sizes_E = jnp.sum((expert_M[:, None] == jnp.arange(experts)[None]).astype(jnp.int32), 0)
    return mlp(rows(order_M), sizes_E)[jnp.argsort(order_M)]


def _in_slots(way, mlp, experts, slots, x_BTD, chosen_BTJ, share_BTJ, keep_BTJ):
    """Through buffers with a number of slots for every expert and sequence, as far as the sequence is here."""
    (B, T, J), x_ID = chosen_BTJ.shape, _flat(x_BTD)
    C = min(slots, T)
    kept_BTE = hits(jnp.where(keep_BTJ, chosen_BTJ, experts), experts)
    slot_BTJ = jnp.take_along_axis(jnp.cumsum(kept_BTE, 1) - 1, chosen_BTJ, -1)
    row_BTJ = (chosen_BTJ * B + jnp.arange(B)[:, None, None]) * C + slot_BTJ
    row_IJ = _flat(jnp.where(keep_BTJ, row_BTJ, experts * B * C))
    token_IJ = jnp.broadcast_to(jnp.arange(B * T)[:, None], (B * T, J))
    token_M = jnp.full(experts * B * C, B * T).at[row_IJ].set(token_IJ, mode="drop")
    buffer_EMD = x_ID.at[token_M].get(mode="fill", fill_value=0).reshape(experts, B * C, -1)
    there_EMD = jax.lax.all_to_all(buffer_EMD, way.experts, 0, 1, tiled=True) if way.experts else buffer_EMD
    there_EMD = mlp(there_EMD, None)
    back_EMD = jax.lax.all_to_all(there_EMD, way.experts, 1, 0, tiled=True) if way.experts else there_EMD
    return _weighed(_flat(back_EMD).at[row_IJ].get(mode="fill", fill_value=0), share_BTJ.reshape(row_IJ.shape))


def _in_rounds(way, mlp, experts, x_ID, chosen_IJ, share_IJ):
    """Through one buffer per device, filled as often as the fullest needs it: none is dropped, and none is large.

    The backward pass sends the tokens again, so nothing is kept of a round.
    """
    (tokens, J), ways, here = chosen_IJ.shape, _size(way.experts), experts // _size(way.experts)
    M = math.ceil(SLACK * tokens * J / ways)
    at_worst = math.ceil(tokens * min(J, here) / M)
    order = jnp.argsort(chosen_IJ.reshape(-1))
    expert = chosen_IJ.reshape(-1)[order]
    ends = jnp.searchsorted(expert, here * jnp.arange(ways + 1))  # of what goes to one device
    needed = jax.lax.pmax(jnp.max(-(-jnp.diff(ends) // M)), way.tokens)

    def turn(number):
        place = ends[:-1, None] + number * M + jnp.arange(M)[None]
        full, place = place < ends[1:, None], jnp.minimum(place, tokens * J - 1)
        token, share = order[place] // J, share_IJ.reshape(-1)[order[place]]
        rows = jnp.where(full[..., None], x_ID[token], 0)
        which = jnp.where(full, expert[place] % here, here)
        rows, which = (jax.lax.all_to_all(x, way.experts, 0, 0, tiled=True) for x in (rows, which))
        o = _by_expert(mlp, lambda order: _merged(rows)[order], _merged(which), here).reshape(rows.shape)
        o = jax.lax.all_to_all(o, way.experts, 0, 0, tiled=True)
        o = jnp.where(full[..., None], o.astype(jnp.float32), 0) * share[..., None]
        return jnp.zeros(x_ID.shape, jnp.float32).at[token].add(o)

    zero_ID = jnp.zeros_like(x_ID, jnp.float32)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(y_ID, number):
        return y_ID + jax.lax.cond(number < needed, turn, lambda _: zero_ID, number), None

    return jax.lax.scan(body, zero_ID, jnp.arange(at_worst))[0]


def _merged(x):
    return x.reshape(-1, *x.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(way, dims, x, weight, sizes_E):
    """`x` times a weight stored in pieces: rows [M, D] by experts of `sizes_E` rows each, or [E, M, D] one by one."""
    return _multiply(x, _gather(way, dims, weight), sizes_E, nn.how().activations)


def _product_forward(way, dims, x, weight, sizes_E):
    return _product(way, dims, x, weight, sizes_E), (x, weight, sizes_E)


def _product_backward(way, dims, saved, cotangent):
    # Written out as nn.project's is: the gathered weight is not kept, and its gradient is summed to its resting place.
    x, weight, sizes_E = saved
    whole = _gather(way, dims, weight)
    into_x = _multiply(cotangent, jnp.swapaxes(whole, 1, 2), sizes_E, x.dtype)
    operands = x.astype(nn.how().operands), cotangent.astype(nn.how().operands)
    if sizes_E is None:
        into_weight = jnp.einsum("EMX,EMY->EXY", *operands, preferred_element_type=jnp.float32)
    else:
        into_weight = jax.lax.ragged_dot_general(
            *operands, sizes_E, _OVER_ROWS, preferred_element_type=jnp.float32, out_sharding=P(None, None, None)
        )
    return into_x, _scatter(way, dims, into_weight).astype(weight.dtype), None


_product.defvjp(_product_forward, _product_backward)
_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _multiply(x, weight, sizes_E, dtype):
    x = x.astype(nn.how().operands)
    if sizes_E is None:
        return jnp.einsum("EMX,EXY->EMY", x, weight, preferred_element_type=dtype)
    return jax.lax.ragged_dot(x, weight, sizes_E, preferred_element_type=dtype, out_sharding=P(None, None))


def _gather(way, dims, weight):
    weight = weight.astype(nn.how().operands)
    for dim, axes in way.gather(dims):
        weight = jax.lax.all_gather(weight, axes, axis=dim, tiled=True)
    return weight


def _scatter(way, dims, gradient):
    """The sum over all devices that share a weight, each piece where it is stored."""
    scattered = way.experts
    for dim, axes in way.gather(dims):
        gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=dim, tiled=True)
        scattered += axes
    left = tuple(axis for axis in way.tokens if axis not in scattered)
    return jax.lax.psum(gradient, left) if left else gradient
