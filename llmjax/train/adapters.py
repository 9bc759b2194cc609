"""Adapters of a model: which weights get one, how they begin, and the model with them.

They are a dict: the path of a weight, such as "blocks.query_DHK", to its two factors by name, "down_DR" and "up_RHK".
Each is cut as the weight is: the rows of A as its rows, the columns of B as its columns.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from llmjax.checkpoint.checkpoints import named
from llmjax.errors import Refused, did_you_mean
from llmjax.models.adapted import RANK, Adapted
from llmjax.optim.weights import sides
from llmjax.run import LoRA

Adapters = dict[str, dict[str, jax.Array]]
LAYERS = ("blocks.", "first.")


def fresh(model: nnx.Module, how: LoRA, key: jax.Array) -> Adapters:
    """Adapters that change nothing yet: A is N(0, 1 / rows), B is 0.

    Raises:
      Refused: the model has no weight that is named.
    """
    leaves = dict(zip(named(model), jax.tree_util.tree_leaves_with_path(model), strict=True))
    letters = {name: sides(*leaf) for name, leaf in leaves.items()}
    return {
        name: _pair(name, leaves[name][1], *letters[name], how.rank, jax.random.fold_in(key, n))
        for n, name in enumerate(chosen(letters, how))
    }


def chosen(letters: dict[str, tuple[str, str]], how: LoRA) -> list[str]:
    """The weights that get an adapter, given the letters of rows and columns of all.

    Raises:
      Refused: there is no such weight.
    """
    able = {name: sides for name, sides in letters.items() if name.startswith(LAYERS) and all(sides)}
    if not how.on:
        return [name for name, (rows, columns) in able.items() if "E" not in rows + columns]
    words = {name: {own := name.rpartition(".")[2], own.rpartition("_")[0]} for name in able}
    for wanted in how.on:
        if not any(wanted in each for each in words.values()):
            known = sorted({name.rpartition(".")[2] for name in able})
            raise Refused(
                f"lora.on has {wanted}, and no matrix of a layer is called so: {did_you_mean(wanted, known)}"
                f"choose of {', '.join(known)}."
            )
    return [name for name in able if words[name] & set(how.on)]


def _pair(name: str, weight: jax.Array, rows: str, columns: str, rank: int, key: jax.Array) -> dict[str, jax.Array]:
    lead = weight.ndim - len(rows) - len(columns)  # layers, experts
    cut, shape, cuts = lead + len(rows), weight.shape, jax.typeof(weight).sharding.spec.partitions
    stack = name.rpartition("_")[2].removesuffix(rows + columns)
    down, up = (*shape[:cut], rank), (*shape[:lead], rank, *shape[cut:])
    a = jax.random.normal(key, down, jnp.float32, out_sharding=P(*cuts[:cut], None))
    b = jnp.zeros(up, jnp.float32, out_sharding=P(*cuts[:lead], None, *cuts[cut:]))
    return {f"down_{stack}{rows}{RANK}": a * math.prod(shape[lead:cut]) ** -0.5, f"up_{stack}{RANK}{columns}": b}


def attached(model: nnx.Module, adapters: Adapters, how: LoRA) -> nnx.Module:
    """The model with its adapters, as `llmjax.models.adapted` uses them; shares all arrays."""
    model = jax.tree.map(lambda x: x, model)  # a copy
    for path, pair in adapters.items():
        owner, name = _owner(model, path)
        setattr(owner, name, Adapted(getattr(owner, name), pair, how.scale))
    return model


def merged(model: nnx.Module, adapters: Adapters, how: LoRA) -> nnx.Module:
    """A plain model that computes the same: every adapter added to its weight."""
    changed = attached(model, adapters, how)
    model = jax.tree.map(lambda x: x, model)
    for path in adapters:
        (owner, name), (adapted, _) = _owner(model, path), _owner(changed, path)
        setattr(owner, name, nnx.Param(getattr(adapted, name)[...]))
    return model


def _owner(model: nnx.Module, path: str) -> tuple[Any, str]:
    """What holds the weight at a path, and by which name."""
    *way, name = path.split(".")
    for part in way:
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model, name
