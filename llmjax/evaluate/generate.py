"""Completing text, greedy or sampled, with any `nn.Decoder` on any mesh.

Prompts are read some tokens at a time, then tokens are written one after another, each through the layers alone; what
earlier ones left there is kept (`llmjax.models.cache`). Shapes come in few sizes, so programs are compiled a few times,
whatever the lengths: lengths and counts are data.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from llmjax.errors import Refused
from llmjax.evaluate.streaming import before
from llmjax.layout import axes_of
from llmjax.models import cache, nn
from llmjax.models.cache import Parts

WIDE, NARROW = 256, 32  # tokens of every row that are read at once, where prompts are long or not
LEAST = 64  # positions by which caches differ at least
BURST = 32  # tokens that are written before the host looks at them
Ends = int | Sequence[int] | None


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    tokens: int = 64
    "New tokens per prompt; a prompt that reaches the end of its text stops earlier."
    temperature: float = 0.0
    "Divides the logits; 0 takes the likeliest token."
    top_k: int = 0
    "Sample among the k likeliest tokens; 0: all."
    top_p: float = 1.0
    "Sample among the likeliest tokens that together have this probability (arXiv:1904.09751)."
    seed: int = 0
    "Seeds the samples."


def check(how: Sampling) -> None:
    """Refuses values that no sampling can have."""
    if how.tokens < 1:
        raise Refused(f"tokens is {how.tokens}: give at least 1.")
    if how.temperature < 0:
        raise Refused(f"temperature is {how.temperature}: give 0 for the likeliest token or a positive number.")
    if how.top_k < 0:
        raise Refused(f"top-k is {how.top_k}: give a positive number, or 0 for no limit.")
    if not 0 < how.top_p <= 1:
        raise Refused(f"top-p is {how.top_p}: give a number above 0 and at most 1.")


def choose(logits_BV: jax.Array, key: jax.Array, how: Sampling) -> jax.Array:
    """The next token of every row, int32 [B]."""
    if how.temperature == 0:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    logits_BV = logits_BV / how.temperature
    ranked_BV = -jnp.sort(-logits_BV, axis=-1)
    if how.top_k:
        least_B1 = ranked_BV[:, min(how.top_k, ranked_BV.shape[-1]) - 1][:, None]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
        ranked_BV = jnp.where(ranked_BV < least_B1, -jnp.inf, ranked_BV)
    if how.top_p < 1:
        chance_BV = jax.nn.softmax(ranked_BV, -1)
        before_BV = jnp.cumsum(chance_BV, -1) - chance_BV  # the first token is always kept
        least_B1 = jnp.min(jnp.where(before_BV < how.top_p, ranked_BV, jnp.inf), -1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)


class State(NamedTuple):
    """Texts as far as they are read or written."""

    cache: cache.Cache
    x_B1D: jax.Array
    "The stream after the last layer at the last token of every row."
    done_B: jax.Array
    "Which rows have come to their end."


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _begin(model: Parts, rows: int, length: int, width: int) -> State:
    x_B1D = model.ends.embed(jnp.zeros((rows, 1), jnp.int32, out_sharding=nn.how().layout.gathered("BT")))
    return State(cache.empty(model, rows, length, width), jnp.zeros_like(x_B1D), jnp.zeros(rows, bool))


@functools.partial(jax.jit, donate_argnums=1)
def _read(
    model: Parts, state: State, tokens_BT: jax.Array, start_B: jax.Array, count_B: jax.Array, asked: jax.Array
) -> State:
    """Takes in the first `count_B` tokens of every row, from position `start_B`; the first `asked` rows matter."""
    tokens_BT = jax.reshard(tokens_BT, nn.how().layout.gathered("BT"))
    x_BTD, kept = cache.extend(model, tokens_BT, start_B, count_B, state.cache)
    last_BT = jnp.arange(tokens_BT.shape[1])[None] == count_B[:, None] - 1
    rows = P(jax.typeof(x_BTD).sharding.spec[0], None)
    last_BT, any_B1 = jax.reshard(last_BT, rows), jax.reshard(count_B[:, None] > 0, rows)
    x_B1D = jnp.sum(jnp.where(last_BT[..., None], x_BTD, 0), 1, keepdims=True).astype(x_BTD.dtype)
    return State(kept, jnp.where(any_B1[..., None], x_B1D, state.x_B1D), jnp.arange(len(count_B)) >= asked)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=1)
def _write(
    model: Parts, state: State, how: Sampling, start_B: jax.Array, made: jax.Array, count: jax.Array,
    seed: jax.Array, ends: jax.Array,
) -> tuple[jax.Array, State]:  # fmt: skip
    """(up to `count` tokens of every row in [B, BURST], the state); fewer once all rows have come to an end."""
    one_B = jnp.ones_like(start_B)

    def more(carry):
        i, _, state = carry
        return (i < count) & ~jnp.all(state.done_B)

    def turn(carry):
        i, tokens_BN, state = carry
        logits_BV = jax.reshard(model.ends.head(state.x_B1D)[:, 0].astype(jnp.float32), P(None, None))
        token_B = choose(logits_BV, jax.random.fold_in(jax.random.key(seed), made + i), how)
        tokens_BN = jax.lax.dynamic_update_slice_in_dim(tokens_BN, token_B[:, None], i, 1)
        token_B1 = jax.reshard(token_B[:, None], nn.how().layout.gathered("BT"))
        x_B1D, kept = cache.extend(model, token_B1, start_B + i, one_B, state.cache)
        done_B = state.done_B | jnp.any(token_B[:, None] == ends[None], -1)
        return i + 1, tokens_BN, State(kept, x_B1D, done_B)

    none_BN = jnp.zeros((start_B.shape[0], BURST), jnp.int32)
    _, tokens_BN, state = jax.lax.while_loop(more, turn, (jnp.int32(0), none_BN, state))
    return tokens_BN, state


class Texts:
    """A resource: texts that grow, one per row, and what the model keeps of them on its devices.

    Use it in the context of the model's program. `ways` rows at least are needed where the mesh cuts the batch; the
    spare ones are like the first.
    """

    def __init__(self, model: nn.Decoder | Parts, rows: int, length: int, width: int = WIDE):
        shape = jax.sharding.get_abstract_mesh().shape
        ways = math.prod(shape[axis] for axis in axes_of(nn.how().layout.inner.get("B")))
        self.asked, self.width = rows, width
        self.rows = -(-rows // ways) * ways
        with _whole():
            self.model = model if isinstance(model, Parts) else cache.parts(model)  # as `ready`
            self.state = _begin(self.model, self.rows, length, width)

    def read(self, texts: Sequence[Sequence[int]], start: int = 0) -> None:
        """Reads tokens of every row, at least one, that follow on the first `start`, which are there."""
        texts = [texts[row if row < self.asked else 0] for row in range(self.rows)]
        count_B = np.array([len(text) for text in texts], np.int32)
        with _whole():
            for at in range(0, max(count_B), self.width):
                tokens_BT = np.zeros((self.rows, self.width), np.int32)
                for row, text in enumerate(texts):
                    piece = text[at : at + self.width]
                    tokens_BT[row, : len(piece)] = piece
                now_B = np.clip(count_B - at, 0, self.width)
                start_B, asked = np.full_like(count_B, start + at), np.int32(self.asked)
                self.state = _read(self.model, self.state, tokens_BT, start_B, now_B, asked)
        self.start_B, self.made = np.int32(start) + count_B, 0

    def write(self, how: Sampling, count: int, ends: Sequence[int]) -> jax.Array:
        """Up to `count` new tokens of every row, [B, BURST]: fewer, and then zeros, once all have come to an end.

        Tokens after a row's end mean nothing. Returns before they are there.
        """
        kind = dataclasses.replace(how, tokens=1, seed=0)
        with _whole():
            tokens_BN, self.state = _write(
                self.model, self.state, kind, self.start_B, np.int32(self.made), np.int32(count), np.uint32(how.seed),
                np.array(ends or [-1], np.int32),
            )  # fmt: skip
        self.start_B, self.made = self.start_B + np.int32(count), self.made + count
        return tokens_BN


def _whole():
    """The context of the program with every position on every device, and attention of any shape."""
    layout = cache.whole_sequences(nn.how().layout)
    return nn.compute(dataclasses.replace(nn.how(), layout=layout, attention="reference", remat="none", offload=False))


def ready(model: nn.Decoder) -> Parts:
    """The model as texts are written with it, for many of them. Call it in the context of the model's program."""
    with _whole():
        return cache.parts(model)


def room(needed: int, positions: int) -> int:
    """Positions of a cache for texts of so many: a quarter more at most, and one of few sizes."""
    step = max(LEAST, 1 << (needed - 1).bit_length() - 3)
    return min(positions, -(-needed // step) * step)


def complete(
    model: nn.Decoder | Parts,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    *,
    positions: int,
    end: Ends = None,
    stop: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
) -> list[list[int]]:
    """New tokens for every prompt, cut before `end`, a token or several. Call it in the context of the model's program.

    Where it is called many times, give it what `ready` makes of the model.
    With strings to `stop` at, which `decode` finds in the tokens' text, they go on through the token that completes
    one; `before` cuts the text.

    Raises:
      Refused: a prompt is empty or, with the new tokens, longer than `positions`.
    """
    check(how)
    if not prompts:
        return []
    longest = fits(prompts, how, positions)
    ends, width = several(end), NARROW if longest <= 2 * NARROW else WIDE
    texts = Texts(model, len(prompts), room(longest + how.tokens, positions), width)
    texts.read(prompts)
    new, open_rows = [[] for _ in prompts], set(range(len(prompts)))
    while open_rows and texts.made < how.tokens:
        count = min(BURST, how.tokens - texts.made)
        tokens_BN = np.asarray(texts.write(how, count, ends))[:, :count]
        for row in sorted(open_rows):
            new[row] += tokens_BN[row].tolist()
            new[row], over = _ended(new[row], len(new[row]) - count, ends, stop, decode)
            open_rows -= {row} if over else set()
    return new


def stream(texts: Texts, how: Sampling, ends: Sequence[int], most: int) -> Iterator[int]:
    """New tokens of a single text as they come, without one that ends it: up to `how.tokens`, and `most`."""
    ahead, count = texts.write(how, 1, ends), min(how.tokens, most)
    for i in range(count):
        now, ahead = ahead, texts.write(how, 1, ends) if i + 1 < count else None  # while the host looks at one
        if (token := int(np.asarray(now)[0, 0])) in ends:
            return
        yield token


def _ended(tokens: list[int], known: int, ends, stop, decode) -> tuple[list[int], bool]:
    """(tokens as far as they count, whether they have come to an end), of which the first `known` have not."""
    at = next((i for i in range(known, len(tokens)) if tokens[i] in ends), None)
    if at is not None:
        tokens = tokens[:at]
    if stop and before(decode(tokens), stop) is not None:
        whole = next(n for n in range(1, len(tokens) + 1) if before(decode(tokens[:n]), stop) is not None)
        return tokens[:whole], True
    return tokens, at is not None


def fits(prompts: Sequence[Sequence[int]], how: Sampling, positions: int) -> int:
    """The longest prompt's length; refuses empty prompts and ones that leave no room for the tokens asked for."""
    longest = max(map(len, prompts))
    if longest + how.tokens > positions:
        raise Refused(
            f"the prompt has {longest} tokens and {how.tokens} more are asked for, but the model has {positions} "
            f"positions: shorten the prompt or lower --tokens."
        )
    if not all(prompts):
        raise Refused("a prompt is empty and the tokenizer has no token to begin with: give --prompt some text.")
    return longest


def several(end: Ends) -> tuple[int, ...]:
    """Tokens that end a text, as a tuple."""
    return () if end is None else (end,) if isinstance(end, int) else tuple(end)
