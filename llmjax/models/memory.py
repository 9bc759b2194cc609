"""What attention remembers of earlier tokens, while a model that continues a text is traced.

Models ask for positions and for attention as ever; where a memory is in force, it answers both. It is a matter of one
trace, and so in no jit key: enter it inside the function that is jitted.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Protocol

import jax

from llmjax.models.scores import Scores


class Memory(Protocol):
    """One layer's, or one turn's of layers."""

    positions_BT: jax.Array
    "Of the tokens that come in, in every row."

    def attend(
        self, kind: Scores, q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array | None, sinks_H: jax.Array | None
    ) -> jax.Array:
        """What queries find among these keys, which are remembered, and those remembered before, [B, T, H, K]."""


_memory: contextvars.ContextVar[Memory | None] = contextvars.ContextVar("memory", default=None)


def of() -> Memory | None:
    """The memory in force."""
    return _memory.get()


@contextlib.contextmanager
def remembering(memory: Memory) -> Iterator[None]:
    """Context in which this memory is in force."""
    token = _memory.set(memory)
    try:
        yield
    finally:
        _memory.reset(token)
