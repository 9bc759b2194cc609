"""Models in which layers of two kinds take turns: local ones, which look back a fixed number of positions, and then a
global one.

One turn is an nnx.List of blocks, and the loop over layers is one over turns. Layers that fit no turn come first.
"""

import functools
from typing import Any

import jax
from flax import nnx

from llmjax.errors import Refused
from llmjax.models import nn
from llmjax.models.llama import LlamaModel


def check(c: Any) -> None:
    """Refuses a config whose layers do not make a turn."""
    if c.every < 1:
        raise Refused(f"model.every is {c.every}: give at least 1, which makes all layers global.")
    if c.layers < c.every:
        raise Refused(
            f"model.layers is {c.layers}, fewer than model.every {c.every}, so that no layer is global: give at least "
            f"as many."
        )


def windows(c: Any) -> tuple[int, ...]:
    """How far each layer of a turn looks back, 0 for all the way.

    Of all layers every `c.every`-th is global; as `c.layers` mod `c.every` of them come before, that need not be the
    last one of a turn.
    """
    ahead = c.layers % c.every
    return tuple(0 if (ahead + i + 1) % c.every == 0 else c.window for i in range(c.every))


class TurnsModel(LlamaModel):
    """A Llama whose blocks are `block(c, window, key)`, in turns of `c.every`."""

    def add_layers(self, c: Any, key: jax.Array, block: Any) -> None:
        before, own = jax.random.split(key)
        if ahead := c.layers % c.every:
            build = functools.partial(_turn, block, c, (c.window,) * ahead)
            self.first = nn.stack(build, before, 1, everywhere=True)
        self.blocks = nn.stack(functools.partial(_turn, block, c, windows(c)), own, c.layers // c.every)


def _turn(block, c, looks_back, key):
    keys = jax.random.split(key, len(looks_back))
    return nnx.List([block(c, window, key) for window, key in zip(looks_back, keys, strict=True)])
