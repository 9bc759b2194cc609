"""Where a number stops being finite: the first parameter, layer or gradient of a step that is not."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.checkpoint.checkpoints import named
from llmjax.models import nn
from llmjax.train import step as steps


def first_not_finite(model: Any, batch: Any, loss: steps.Loss) -> str | None:
    """What is not finite first, in the order in which a step computes it, in words; None if all of it is.

    The order: parameters, the embedding, every layer, the logits, the loss; then gradients, from the last layer to the
    first. Layers are told apart in models that are an `nn.Decoder` and run without stages. The batch is [A, B, ...].
    """
    for found in (_parameters(model), *_forward(model, batch, loss), _gradients(model, batch, loss)):
        bad = next(found, None)
        if bad is not None:
            return bad
    return None


def _parameters(model: Any) -> Iterator[str]:
    finite = jax.jit(lambda model: {name: _per_layer(name, x) for name, x in named(model).items()})(model)
    for name, whole in finite.items():
        for path in _bad(name, np.asarray(whole)):
            yield f"the parameter {path}"


def _forward(model: Any, batch: Any, loss: steps.Loss) -> list[Iterator[str]]:
    microbatches = [jax.tree.map(lambda x, a=a: x[a], batch) for a in range(len(jax.tree.leaves(batch)[0]))]
    decoder = hasattr(model, "blocks") and hasattr(model, "layer") and nn.stages() == 1
    flags = jax.jit(_layers if decoder else lambda model, batch: {})
    total = jax.jit(lambda model, batch: jnp.isfinite(loss(model, batch)[0]))

    def inside() -> Iterator[str]:
        for number, microbatch in enumerate(microbatches):
            where = f" (microbatch {number} of {len(microbatches)})" if len(microbatches) > 1 else ""
            for name, whole in flags(model, microbatch).items():
                for path in _bad(name, np.asarray(whole)):
                    yield f"what {path} gives{where}"
            if not total(model, microbatch):
                yield f"the loss, of logits that are finite{where}" if decoder else f"the loss{where}"

    return [inside()]


def _layers(model: nn.Decoder, batch: Any) -> dict[str, jax.Array]:
    """Of the embedding, each layer [L] and the head: whether all that it gives is finite."""
    x_BTD = nn.embedded(model, batch["tokens"], batch.get("segments"))
    embedded = jnp.all(jnp.isfinite(x_BTD))

    def turn(x_BTD, block):
        x_BTD, _ = nn.turn(model.layer, block, x_BTD, batch.get("segments"))
        return x_BTD, jnp.all(jnp.isfinite(x_BTD))

    x_BTD, finite_L = jax.lax.scan(turn, x_BTD, model.blocks)
    logits_BTV = model.head(x_BTD)
    return {"the embedding": embedded, "blocks": finite_L, "the head": jnp.all(jnp.isfinite(logits_BTV))}


def _gradients(model: Any, batch: Any, loss: steps.Loss) -> Iterator[str]:
    def of(model, batch):
        _, _, grads = steps.gradients(model, batch, loss)
        return {name: _per_layer(name, x) for name, x in named(grads).items()}

    found = {name: np.asarray(whole) for name, whole in jax.jit(of)(model, batch).items()}
    layers = max((whole.size for name, whole in found.items() if name.startswith("blocks.")), default=0)
    stacked = {name: whole for name, whole in found.items() if whole.size > 1 or name.startswith("blocks.")}
    for name in sorted(found.keys() - stacked.keys(), key=lambda name: "embed" in name):
        if "embed" not in name and not found[name].all():
            yield f"the gradient of {name}"
    for layer in reversed(range(layers)):
        for name, whole in stacked.items():
            if not whole.ravel()[layer]:
                yield f"the gradient of {_path(name, layer)}"
    for name in found.keys() - stacked.keys():
        if not found[name].all():
            yield f"the gradient of {name}"


def _per_layer(name: str, x: jax.Array) -> jax.Array:
    """Whether all of a leaf is finite; of one of the stacked layers, [L], each."""
    finite = jnp.isfinite(x)
    return jnp.all(finite, axis=tuple(range(1, x.ndim))) if name.startswith("blocks.") else jnp.all(finite)


def _bad(name: str, whole: np.ndarray) -> Iterator[str]:
    if whole.ndim == 0 and not whole:
        yield name
    for layer in np.flatnonzero(~whole) if whole.ndim else ():
        yield _path(name, int(layer))


def _path(name: str, layer: int) -> str:
    """`blocks.query_DHK` of layer 3 is `blocks.3.query_DHK`."""
    return ".".join(["blocks", str(layer), *name.split(".")[1:]])
