"""The functions that models are written with.

A model file says only the maths. Where each array lives and in which precision a product is taken is said once, by the
`Compute` in force while the model is traced; it takes part in every jit key.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P
from jax.ad_checkpoint import checkpoint_name

from llmjax import layout as layouts
from llmjax.layout import Layout, Pipeline
from llmjax.models import adapted, memory, pipeline, quantized

Sizes = Mapping[str, int]
# What a layer's arrays are called where a policy decides what to keep: what goes into it, what attention gives, and
# products with weights, wide ones of the feed-forward's width.
STREAM, ATTENTION, PRODUCT, WIDE = "stream", "attention", "product", "wide product"
KEPT = {
    "none": (),
    "dots": (STREAM, ATTENTION, PRODUCT, WIDE),
    "attention": (STREAM, ATTENTION, PRODUCT),
    "full": (STREAM,),
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the maths of a model is carried out."""

    layout: Layout = layouts.dp
    operands: str = "float32"  # dtype of the two factors of every product with a weight
    rounding: str = ""  # or int8 or float8_e4m3fn, to which those of a layer's products are rounded; see `_rounds`
    activations: str = "float32"  # dtype of the product, and of the residual stream
    remat: str = "none"  # what the backward pass computes again: all but what KEPT names
    offload: bool = False  # whether that is kept in the host's memory
    unroll: int = 1  # layers per turn of the loop over them
    microbatches: int = 1  # of those that are summed up, per turn of the loop over them
    chunk: int = 0  # positions of a sequence that the loss takes at once; 0: all
    pipeline: Pipeline = Pipeline()  # how microbatches pass through the stages
    attention: str = "reference"  # or blocked, splash, cudnn, ring
    block: int = 1024  # most positions in a block of attention
    interpret: bool = False  # run that kernel by what it means, on any platform
    apart: bool = False  # whether a product with a weight is compiled apart from what is done to its result


_compute = jax.make_user_context(Compute())


def compute(how: Compute):
    """Context in which models are traced, initialised and called."""
    return _compute(how)


def how() -> Compute:
    """The `Compute` in force."""
    return _compute.value


def normal(key: jax.Array, dims: str, sizes: Sizes, scale: float) -> nnx.Param:
    """A parameter drawn from N(0, scale²), born in its resting place: no device ever holds the whole."""
    shape = tuple(sizes[d] for d in dims)
    return nnx.Param(scale * jax.random.normal(key, shape, jnp.float32, out_sharding=how().layout.at_rest(dims)))


def full(value: float, dims: str, sizes: Sizes) -> nnx.Param:
    """A parameter that starts at one value."""
    shape = tuple(sizes[d] for d in dims)
    return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=how().layout.at_rest(dims)))


def use(weight: nnx.Param, dims: str) -> jax.Array:
    """The weight as a product needs it: cast, then gathered over the axes that cut the batch."""
    return _gather(weight[...], dims)


def at_rest(weight: nnx.Param, dims: str) -> jax.Array:
    """The weight where it is stored."""
    value, place = weight[...], how().layout.at_rest(dims)
    # Resharded to where it is, it would be a new value of every turn over the layers, and kept besides the weight.
    return value if jax.typeof(value).sharding.spec == place else jax.reshard(value, place)


def project(subscripts: str, x: jax.Array, weight: nnx.Param) -> jax.Array:
    """`jnp.einsum(subscripts, x, weight)` of an activation and a weight, placed by the letters of the result."""
    return project_all((subscripts,), x, weight)[0]


def project_all(subscripts: Sequence[str], x: jax.Array, *weights: nnx.Param) -> list[jax.Array]:
    """`project` of one activation by several weights, whose parts of its gradient are summed over devices as one."""
    pairs = list(zip(subscripts, weights, strict=True))
    low = [(n, w, ways) for n, (each, w) in enumerate(pairs) if (ways := adapted.beside(w, each))]
    factors = (*(adapted.plain(w, each) for each, w in pairs), *(w.down[...] for _, w, _ in low))
    products = _project((*subscripts, *(down for _, _, (down, _) in low)), how(), x, factors)
    for (n, w, (_, up)), h in zip(low, products[len(pairs) :], strict=True):
        products[n] += w.scale * _project((up,), how(), h, (w.up[...],))[0]
    names = (WIDE if "F" in each else PRODUCT for each in subscripts)
    return [checkpoint_name(y, name) for y, name in zip(products[: len(pairs)], names, strict=True)]


def kept(x: jax.Array) -> jax.Array:
    """Something made of products, for the backward pass to keep it where it would keep those."""
    return checkpoint_name(x, PRODUCT)


# JAX traces both halves of its derivative when the model has been traced, and so outside of any narrower `inside`.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _project(subscripts, then, x, weights):
    def one(subscripts, weight):
        x_dims, dims, out = _dims(subscripts)
        place = how().layout.activation(out)
        if not _rounds(dims):
            return _apart(_einsum(subscripts, x, _gather(weight, dims), how().activations, place))
        factors = _rounded(x, x_dims, out), _rounded_and_gathered(weight, dims, out)
        return jax.reshard(_unreduced(subscripts, *factors, how().activations, place)[0], place)

    with compute(then):
        return [one(*each) for each in zip(subscripts, weights, strict=True)]


def _project_forward(subscripts, then, x, weights):
    return _project(subscripts, then, x, weights), (x, weights)


def _project_backward(subscripts, then, saved, cotangents):
    with compute(then):
        return _slopes(subscripts, *saved, cotangents)


def _slopes(subscripts, x, weights, cotangents):
    # Written out for four reasons: the gathered weight is not kept for the backward pass but gathered again (ZeRO-3);
    # its gradient is summed straight to the resting place; all products take operands in the chosen precision; and
    # devices exchange sums once, after what all weights add to the gradient of x is added up, over all axes together.
    into_x, into_weights = {}, []
    for each, weight, cotangent in zip(subscripts, weights, cotangents, strict=True):
        x_dims, dims, out = _dims(each)
        cotangent = jax.reshard(cotangent.astype(how().operands), how().layout.gathered(out))
        if _rounds(dims):
            factors = _rounded(cotangent, out, x_dims), _rounded_and_gathered(weight, dims, x_dims)
        else:
            factors = cotangent, _gather(weight, dims)
        part, over = _unreduced(f"{out},{dims}->{x_dims}", *factors, x.dtype, jax.typeof(x).sharding.spec)
        into_x[over] = into_x[over] + part if over in into_x else part
        place = how().layout.in_use(dims) if _opens() else jax.typeof(weight).sharding.spec
        part, over = _unreduced(f"{x_dims},{out}->{dims}", x, cotangent, jnp.float32, place)
        into_weights.append(_sum_to(part, over, weight))
    return sum(jax.reshard(part, jax.typeof(x).sharding) for part in into_x.values()), tuple(into_weights)


_project.defvjp(_project_forward, _project_backward)


def _unreduced(subscripts, a, b, dtype, place) -> tuple[jax.Array, frozenset[str]]:
    """The product with its sum over devices left open, and the axes it is open over; cut over others as `place`."""
    a_dims, _, out = _dims(subscripts)
    rounds = isinstance(a, quantized.Factor)
    cuts = zip(a_dims, jax.typeof(a.values if rounds else a).sharding.spec, strict=True)
    over = frozenset(axis for d, cut in cuts if d not in out for axis in layouts.axes_of(cut) if _opens())
    left = (tuple(axis for axis in layouts.axes_of(cut) if axis not in over) or None for cut in place.partitions)
    place = P(*left, unreduced=over)
    return _apart((quantized.einsum if rounds else _einsum)(subscripts, a, b, dtype, place)), over


def _apart(x: jax.Array) -> jax.Array:
    """The result of a product. By the compiler's own cycles, norms and gates take more in a v5p's loop than alone."""
    return jax.lax.optimization_barrier(x) if how().apart else x


def _opens() -> bool:
    """Whether sums may be left open: jax 0.10 cannot where some axes, and not all, are manual."""
    return jax.sharding.get_abstract_mesh().are_all_axes_explicit


def _sum_to(part: jax.Array, over: frozenset[str], weight: jax.Array) -> jax.Array:
    """The gradient of a weight, in its dtype, from a product that is open over these axes.

    It is summed first over those that cut the weight, so that the others carry a part only; and not over those over
    which the weight's type says that its gradient stays open.
    """
    spec = jax.typeof(weight).sharding.spec
    cutting = frozenset(axis for cut in spec.partitions for axis in layouts.axes_of(cut))
    part = jax.reshard(part, P(*spec.partitions, unreduced=over - cutting))
    return jax.reshard(part, P(*spec.partitions, unreduced=spec.reduced)).astype(weight.dtype)


def _dims(subscripts: str) -> tuple[str, str, str]:
    x_dims, rest = subscripts.split(",")
    return x_dims, *rest.split("->")


def _rounds(dims: str) -> bool:
    """Whether the product with a weight, and the one that gives the gradient of its other factor, take eight bits.

    The head's and an adapter's do not, and nowhere does the gradient of a weight: it sums over tokens, of which a few
    are far larger than others, and rounding those of one device alike would take the largest of all devices
    (arXiv:2304.13013).
    """
    return bool(how().rounding) and "V" not in dims and adapted.RANK not in dims


def _rounded(x: jax.Array, dims: str, out: str) -> quantized.Factor:
    return quantized.rounded(x, how().rounding, dims, out)


def _rounded_and_gathered(weight: jax.Array, dims: str, out: str) -> quantized.Factor:
    """A weight for a product with the dims `out`, rounded where it is stored."""
    weight = jax.reshard(weight, P(*jax.typeof(weight).sharding.spec.partitions))
    return quantized.moved(_rounded(weight, dims, out), how().layout.in_use(dims))


def _gather(weight: jax.Array, dims: str) -> jax.Array:
    return jax.reshard(weight.astype(how().operands), how().layout.in_use(dims))


def _einsum(subscripts, a, b, dtype, place) -> jax.Array:
    a, b = a.astype(how().operands), b.astype(how().operands)
    return jnp.einsum(subscripts, a, b, preferred_element_type=dtype, out_sharding=place)


def product(subscripts: str, a: jax.Array, b: jax.Array, place: Any = None) -> jax.Array:
    """`jnp.einsum` of two activations, with float32 sums."""
    return _einsum(subscripts, a, b, jnp.float32, place)


def bias(weight: nnx.Param, dims: str, out: str) -> jax.Array:
    """A bias with `dims`, shaped to be added to an activation with dims `out`."""
    value = jax.reshard(weight[...].astype(how().activations), how().layout.in_use(dims))
    return jnp.expand_dims(value, tuple(i for i, d in enumerate(out) if d not in dims))


def open_sums(model: nnx.Module) -> nnx.Module:
    """The model, with gradients that are not summed over the axes that cut tokens and not the weight (`P.unreduced`).

    Each device then has the sum over its own tokens. The gradients of scales and biases are summed all the same, and
    then held by one device. Weights may only be used through the functions of this module: `jnp` refuses to combine
    them with what is cut over such an axis.
    """
    if not _opens() or stages() > 1:
        return model

    def opened(weight):
        spec = jax.typeof(weight).sharding.spec
        cutting = frozenset(axis for cut in spec for axis in layouts.axes_of(cut))
        return jax.reshard(weight, P(*spec, reduced=_tokens() - cutting))

    return jax.tree.map(opened, model)


def _tokens() -> frozenset[str]:
    """The axes that cut tokens inside blocks."""
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = (axis for d in "BT" for axis in layouts.axes_of(how().layout.inner.get(d)))
    return frozenset(axis for axis in axes if sizes[axis] > 1)


def gathered_once(weights: Sequence[jax.Array], dims: Sequence[str]) -> tuple[jax.Array, ...]:
    """Weights with these letters as `project` uses them, for many uses; one without letters stays as it is.

    Their gradients are float32 sums over a device's own tokens, left open where they may be: for `summed_once`.
    """

    def gathered(weight, dims):
        if len(dims) < 2:
            return weight
        place = how().layout.in_use(dims)
        place = P(*place, reduced=_tokens()) if _opens() else place
        # In float32 as the type of what is added up; the compiler casts back before anything is written.
        return jax.reshard(weight.astype(how().operands), place).astype(jnp.float32)

    return tuple(gathered(*each) for each in zip(weights, dims, strict=True))


def summed_once(gradients: Sequence[jax.Array], weights: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Gradients of what `gathered_once` made, where these weights are stored."""

    def summed(gradient, weight):
        return _sum_to(gradient, jax.typeof(gradient).sharding.spec.unreduced, weight)

    return tuple(summed(*each) for each in zip(gradients, weights, strict=True))


def dims_of(path: tuple[Any, ...]) -> str:
    """The letters that the name at this path ends in, `head_DV`; nothing where it has none, or is a vector's."""
    name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value").rpartition(".")[2]
    words = name.split("_")
    return words[-1] if words[-1].isupper() and not {"scale", "bias"} & set(words) else ""


def zeros(like: Any) -> jax.Array:
    """Zeros of this shape, type and place."""
    return jnp.zeros(like.shape, like.dtype, out_sharding=like.sharding)


def as_varying(tree: Any, as_this: jax.Array) -> Any:
    """Arrays that are alike over manual axes, made to vary over those that this one varies over, as loops want it."""
    kind = jax.typeof(as_this)
    over = tuple(kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying)
    return jax.lax.pcast(tree, over, to="varying") if over else tree


def stages() -> int:
    """How many stages the layers are cut into."""
    cut = pipeline.STAGE in layouts.axes_of(how().layout.params.get("L"))
    return jax.sharding.get_abstract_mesh().shape[pipeline.STAGE] if cut else 1


def ring() -> str | None:
    """The mesh axis around which keys and values travel; None where every device sees all of them."""
    axes = layouts.axes_of(how().layout.inner.get("S"))
    axes = [axis for axis in axes if jax.sharding.get_abstract_mesh().shape[axis] > 1]
    return axes[0] if axes else None


def unclaimed() -> set[str]:
    """The mesh axes that this part of the program does not have to itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return set(mesh.axis_names) - set(mesh.manual_axes)


def on_devices(call: Callable, places: Any, *args):
    """`call(*args)` of what every device holds, for results that are cut as `places` says; not differentiable.

    It is manual over every axis, also those that nothing is said over: they would be left to the partitioner, which
    gathers at the border (jax 0.10).
    """
    # Callers have derivatives of their own, so there is nothing here to keep. Without saying so, JAX moves what no
    # layer changes, such as masks, out of the loop over layers, and cannot where this is inside a pipeline's shard_map.
    return jax.checkpoint(jax.shard_map(call, out_specs=places, axis_names=unclaimed()))(*args)


def order(length: int) -> np.ndarray:
    """The positions of a sequence in the order in which devices hold them, [T].

    Around a ring of n devices each holds two pieces of the 2n that a sequence is cut into, one from the front and one
    from the back, so that all have as much of the causal triangle to compute (zig-zag).
    """
    if not ring():
        return np.arange(length)
    ways = jax.sharding.get_abstract_mesh().shape[ring()]
    pieces = np.arange(length).reshape(2 * ways, -1)
    return np.stack([pieces[:ways], pieces[: ways - 1 : -1]], 1).reshape(-1)


def positions(length: int) -> jax.Array:
    """`order` as an array beside the activations, [1, T]; those of every row, [B, T], where a memory says them."""
    if (kept := memory.of()) is not None:
        return kept.positions_BT
    return jax.reshard(jnp.asarray(order(length), jnp.int32)[None], how().layout.gathered("_T"))


def in_order(x_BT: jax.Array) -> jax.Array:
    """Something per token, such as targets, in the order and place in which the model's outputs are."""
    place = how().layout.gathered("BT")
    if not ring():
        return jax.reshard(x_BT, place)
    return x_BT.at[:, order(x_BT.shape[1])].get(out_sharding=place)


def enter(x_BTD: jax.Array) -> jax.Array:
    """The residual stream as the inside of a block sees it: whole where a layout cuts only the stream."""
    return jax.reshard(x_BTD, how().layout.gathered("BTD"))


@jax.named_scope("embedding")
def embed(tokens_BT: jax.Array, table_VD: nnx.Param) -> jax.Array:
    """Rows of the table."""
    V, D = how().layout.in_use("VD")
    if jax.__version_info__ >= (0, 11) and not _opens():
        V = None  # where some axes are manual, XLA of jax 0.12 aborts at a lookup in a table cut over V
    place = P(V, D, reduced=jax.typeof(table_VD[...]).sharding.spec.reduced)
    table = jax.reshard(table_VD[...].astype(how().operands), place).astype(how().activations)
    found_BTD = table.at[tokens_BT].get(out_sharding=how().layout.gathered("BTD"))  # a table cut over V stays so
    return jax.reshard(found_BTD, how().layout.activation("BTD"))


def rms_norm(x: jax.Array, scale: nnx.Param, epsilon: float, dims: str = "D", plus: float = 0.0) -> jax.Array:
    """x / rms(x) * (plus + scale), in float32, over the last dims of x, those of the scale (arXiv:1910.07467)."""
    over, norm = tuple(range(-len(dims), 0)), x.astype(jnp.float32)
    norm = norm * jax.lax.rsqrt(jnp.mean(norm * norm, over, keepdims=True) + epsilon)
    scale = jnp.expand_dims(vector(scale, dims), tuple(range(x.ndim - len(dims))))
    return (norm * (scale + plus if plus else scale)).astype(x.dtype)


def layer_norm(x_BTD: jax.Array, scale_D: nnx.Param, bias_D: nnx.Param, epsilon: float) -> jax.Array:
    """(x - mean) / std * scale + bias, in float32 (arXiv:1607.06450)."""
    x = x_BTD.astype(jnp.float32)
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon)
    return (x * vector(scale_D, "D")[None, None] + vector(bias_D, "D")[None, None]).astype(x_BTD.dtype)


def vector(weight: nnx.Param, dims: str) -> jax.Array:
    """A scale, a bias or the like in float32, where it is used."""
    return jax.reshard(weight[...], how().layout.in_use(dims))


class Decoder(Protocol):
    """What a language model is made of, so that its layers may be run in stages and its loss taken piece by piece.

    Calling it, `model(tokens_BT, segments_BT) -> logits_BTV`, is `decode`: embed, every layer in turn, head. Attention
    stays within equal segments. Positions come, and logits leave, in the order that `order` says.
    """

    blocks: nnx.Module
    "The layers, every parameter with a leading L; an nnx.List where layers of several kinds take turns, see `turn`."
    first: nnx.Module | None
    "Layers before them that are unlike them or fit no turn, in the same form; a model without them lacks the name."

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """The residual stream before the first layer, [B, T, D]."""

    def layer(
        self, block: nnx.Module, x_BTD: jax.Array, segments_BT: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """The stream after one layer, and what the layer counted over its tokens."""

    def head(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] from the stream after the last layer."""


def decode(
    model: Decoder, tokens_BT: jax.Array, segments_BT: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
    """(logits [B, T, V], what the layers counted, each with a leading L)."""
    x_BTD, sums = stream(model, tokens_BT, segments_BT)
    return model.head(x_BTD), sums


def stream(
    model: Decoder, tokens_BT: jax.Array, segments_BT: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
    """(the stream [B, T, D] after the last layer, what the layers counted, each with a leading L)."""
    return scan(model.blocks, embedded(model, tokens_BT, segments_BT), segments_BT, model.layer)


def embedded(model: Decoder, tokens_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """The stream [B, T, D] before `model.blocks`. Layers that come first are run by every stage, and count nothing."""
    x_BTD, first = model.embed(tokens_BT), getattr(model, "first", None)
    return x_BTD if first is None else layers(model.layer, first, x_BTD, segments_BT)[0]


def stack(
    block: Callable[[jax.Array], nnx.Module], key: jax.Array, layers: int, everywhere: bool = False
) -> nnx.Module:
    """`layers` blocks as one, every parameter with a leading L.

    With stages, each makes its own and no other, but all of them where every stage is to have them `everywhere`.
    """
    keys = jax.random.split(key, layers)
    if stages() == 1 or everywhere:
        return jax.vmap(block)(keys)
    place = jax.P(pipeline.STAGE)
    own = jax.shard_map(jax.vmap(block), in_specs=place, out_specs=place, axis_names={pipeline.STAGE})
    return own(jax.reshard(keys, place))


def scan(
    blocks: nnx.Module,
    x_BTD: jax.Array,
    segments_BT: jax.Array | None,
    layer: Callable[[nnx.Module, jax.Array, jax.Array | None], tuple[jax.Array, Any]],
) -> tuple[jax.Array, Any]:
    """Runs stacked blocks one after another, or in stages; `remat` decides what the backward pass computes again.

    Returns the stream after the last one and what the layers counted, stacked.
    """
    if stages() == 1:
        return layers(layer, blocks, x_BTD, segments_BT)
    own = pipeline.axes(how().pipeline, layouts.axes_of(how().layout.inner.get("B")))
    call = functools.partial(inside, own, functools.partial(layers, layer))
    return pipeline.forward(call, blocks, x_BTD, segments_BT, how().pipeline)


def layers(layer: Callable, blocks: nnx.Module, x_BTD: jax.Array, segments_BT: jax.Array | None):
    """Runs stacked blocks one after another, as `scan` without stages."""

    def one(block, x_BTD, segments_BT):
        return layer(block, checkpoint_name(x_BTD, STREAM) if how().offload else x_BTD, segments_BT)

    if how().remat != "none":
        one = jax.checkpoint(one, policy=_policy(KEPT[how().remat]))
    kinds, length = len(blocks) if isinstance(blocks, nnx.List) else 1, len(jax.tree.leaves(blocks)[0])
    unroll = min(how().unroll, length)
    x_BTD, counted = jax.lax.scan(lambda x, block: turn(one, block, x, segments_BT), x_BTD, blocks, unroll=unroll)
    if kinds > 1:
        counted = jax.tree.map(lambda x: x.reshape(length * kinds, *x.shape[2:]), counted)
    return x_BTD, counted


def turn(layer: Callable, blocks: nnx.Module, x_BTD: jax.Array, segments_BT: jax.Array | None):
    """One turn of the loop over layers: one block or, of an nnx.List, each in its turn; what they count is stacked."""
    if not isinstance(blocks, nnx.List):
        return layer(blocks, x_BTD, segments_BT)
    counted = []
    for block in blocks:
        x_BTD, sums = layer(block, x_BTD, segments_BT)
        counted.append(sums)
    return x_BTD, jax.tree.map(lambda *each: jnp.stack(each), *counted)


def _policy(names: tuple[str, ...]) -> Callable:
    if not how().offload:
        return jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=list(names),
        offload_src="device", offload_dst="pinned_host",
    )  # fmt: skip


def inside(axes: Iterable[str], call: Callable, *args):
    """`call(*args)` in a part of the program that has these mesh axes to itself, and so a layout without them."""
    layout = functools.reduce(Layout.without, axes, how().layout)
    with compute(dataclasses.replace(how(), layout=layout)):
        return call(*args)
