"""Tokenizers as configs: each builds a `tokenizers.Tokenizer` that knows the end of a text.

`tokenizers` is imported where it is used, so that importing a config stays cheap.
"""

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from llmjax import reading
from llmjax.data import spm
from llmjax.errors import DATA, USAGE, Refused

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>",
         "<｜end▁of▁sentence｜>")  # fmt: skip

# Code is mostly line ends with the next line's indentation, and identifiers with the blank or dot before them: each
# is one piece, so each can become one token. On the standard library this gives 2 % fewer tokens than GPT-2's pattern.
PIECES = r"\s*\n[ \t]*|[ .]?[\p{L}_][\p{L}\p{N}_]*| ?\p{N}+| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class BPE:
    """Byte-level byte-pair encoding (arXiv:1508.07909, GPT-2's byte alphabet), trained on the training documents."""

    vocab: int = 4096
    "Number of tokens at most, the 256 bytes and the end of text included; a small corpus gives fewer."

    def identity(self) -> str:
        """What decides the tokenizer, besides the training documents.

        Raises:
          Refused: `vocab` has no room for the 256 bytes and the end of text (code 2).
        """
        if self.vocab < 257:
            raise Refused(
                f"data.tokenizer.vocab is {self.vocab}: give at least 257 (256 bytes and the end of text).", USAGE
            )
        return f"{self!r} {PIECES}"

    def build(self, documents: Iterable[str]) -> "Tokenizer":
        """Trains on `documents`. The same documents give the same tokenizer, and every text round-trips.

        Raises:
          Refused: as `identity`.
        """
        self.identity()
        from tokenizers import trainers

        tokenizer = _byte_level(vocab=None)
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(_alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents, trainer)
        return plain(tokenizer)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """One token per byte, whose id is the byte, and 256 for the end of text."""

    def identity(self) -> str:
        """What decides the tokenizer."""
        return repr(self)

    def build(self, documents: Iterable[str] = ()) -> "Tokenizer":
        """Needs no documents. Every text round-trips."""
        tokenizer = _byte_level(vocab={character: byte for byte, character in enumerate(_alphabet())})
        tokenizer.add_special_tokens([END_OF_TEXT])
        return plain(tokenizer)


@dataclasses.dataclass(frozen=True)
class TokenizerFile:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library, or a SentencePiece `.model`."""

    path: str
    "The file; nothing is downloaded."

    def identity(self) -> str:
        """What decides the tokenizer: the file's content, wherever it lies."""
        try:
            content = reading.content(Path(self.path).expanduser(), reading.TOKENIZER, follow=True)
            return f"TokenizerFile {hashlib.sha256(content).hexdigest()}"
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise Refused(
                f"data.tokenizer.path '{self.path}' cannot be read ({why}): give a tokenizer.json.", DATA
            ) from None

    def build(self, documents: Iterable[str] = ()) -> "Tokenizer":
        """Loads the file; needs no documents. A text round-trips if the file's tokenizer does that.

        Raises:
          Refused: the file is missing, is no tokenizer, or names no end of text (code 65).
        """
        self.identity()
        tokenizer = load(self.path)
        tokenizer.no_padding()
        tokenizer.no_truncation()  # a file may ask for 512 tokens at most, which would drop text in silence
        end_of_text(tokenizer)
        return tokenizer


def load(path: str | Path) -> "Tokenizer":
    """Reads a `tokenizer.json`, or a SentencePiece `.model`.

    Raises:
      Refused: the file is missing, larger than any, or is no tokenizer (code 65); what reads it is not installed.
    """
    from tokenizers import Tokenizer

    try:
        content = reading.content(Path(path).expanduser(), reading.TOKENIZER, follow=True)
        if str(path).endswith(".model"):
            return plain(spm.convert(content, str(path)))
        return plain(Tokenizer.from_buffer(content))
    except Refused:
        raise
    except Exception as error:  # the library raises bare Exception
        raise Refused(f"'{path}' is not a tokenizer.json ({error}): give one written by `tokenizers`.", DATA) from None


def plain(tokenizer: "Tokenizer") -> "Tokenizer":
    """Makes a special token's name inside a text ordinary text: a document must not forge the end of a document."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text(tokenizer: "Tokenizer") -> int:
    """The id of the token that stands between documents.

    Raises:
      Refused: the tokenizer has none of the usual names for it (code 65).
    """
    for name in _ENDS:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return token
    raise Refused(f"the tokenizer has no end-of-text token: add one named {END_OF_TEXT} to its file.", DATA)


def vocabulary(tokenizer: "Tokenizer") -> int:
    """The size of the embedding table this tokenizer needs: its largest id plus one, as ids may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _byte_level(vocab: dict[str, int] | None) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[] if vocab else None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _alphabet() -> list[str]:
    """The character that stands for each byte in GPT-2's vocabulary: printable Latin-1 as it is, others from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]
