"""One text that grows by turns: what is read of it and what a model answers."""

from collections.abc import Iterator, Sequence

import jax

from llmjax.evaluate.generate import WIDE, Sampling, Texts, stream
from llmjax.models import nn
from llmjax.models.cache import Parts


class Conversation:
    """A resource: a text, and what the model keeps of it. Use it in the context of the model's program."""

    def __init__(self, model: nn.Decoder | Parts, positions: int):
        self.texts = Texts(model, 1, positions)
        self.positions, self.tokens = positions, []
        lengths = {x.shape[3] for x in jax.tree.leaves(self.texts.state.cache)}
        self.rings = min(lengths, default=positions) < positions  # old positions make room for new ones

    def read(self, tokens: Sequence[int]) -> int:
        """Makes this the text, and returns how many tokens were new: what it begins with as before is not read again.

        Call it with at least one token, and not with more than `positions`.
        """
        pairs = zip(tokens[:-1], self.tokens, strict=False)
        same = next((i for i, (new, old) in enumerate(pairs) if new != old), min(len(tokens) - 1, len(self.tokens)))
        if self.rings and len(self.tokens) - same > WIDE // 2:  # what windows would see of it may be gone
            same = 0
        self.tokens = list(tokens[:same])
        self.texts.read([tokens[same:]], same)
        self.tokens = list(tokens)
        return len(tokens) - same

    def answer(self, how: Sampling, ends: Sequence[int]) -> Iterator[int]:
        """New tokens one by one, until one of `ends`, which is left out, `how.tokens`, or the last position."""
        for token in stream(self.texts, how, ends, self.positions - len(self.tokens)):
            self.tokens.append(token)
            yield token
