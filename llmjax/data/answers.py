"""Conversations as texts of which a part is to be learnt: what the assistant says, as the chat template writes it.

The part is found by rendering what comes before a message and what ends with it, so any template will do.
"""

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmjax.data import chat, corpus
from llmjax.data.chat import Template
from llmjax.errors import DATA, Refused

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Message = Mapping[str, Any]

LONGEST = 1 << 26  # bytes of a line; a longer one is bad
_ENDINGS = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")


class Learnt(NamedTuple):
    """A text, and the (start, end) of its characters that are to be learnt."""

    text: str
    spans: tuple[tuple[int, int], ...]


class BadLine(ValueError):
    """What a line says is not what it should; the message says why."""


def files(path: str) -> list[tuple[str, Path]]:
    """The JSONL files at a path, sorted by name.

    Raises:
      Refused: there is none (code 65).
    """
    if not path:
        raise Refused("data.path is empty: give a .jsonl file, or a folder of them.", DATA)
    found = corpus.files(path)
    if Path(path).expanduser().is_dir():
        found = [(name, file) for name, file in found if name.endswith(_ENDINGS)]
    if not found:
        raise Refused(f"data.path '{path}' has no file that ends with {', '.join(_ENDINGS)}: put some there.", DATA)
    return found


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, content) of the lines of a file that are not blank.

    Raises:
      Refused: it cannot be read (code 65).
    """
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
            for number in itertools.count(1):
                line = file.readline(LONGEST)
                if not line:
                    return
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise Refused(f"'{path}' cannot be read ({why}): give a whole file.", DATA) from None


def parsed(line: bytes) -> dict[str, Any]:
    """The object that a line holds.

    Raises:
      BadLine: it holds none.
    """
    if len(line) == LONGEST:
        raise BadLine(f"longer than {LONGEST:,} bytes")
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8: {error.reason}") from None
    except (ValueError, RecursionError):
        raise BadLine("not JSON") from None
    if not isinstance(value, dict):
        raise BadLine("no object")
    return value


def messages(value: Any, field: str) -> list[Message]:
    """The messages in a field: a list of objects with a role and a text as content.

    Raises:
      BadLine: it is something else.
    """
    if not (isinstance(value, list) and value):
        raise BadLine(f"{field} is {'empty' if value == [] else 'no list of messages'}")
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise BadLine(f"{field}[{number}] is no object")
        for name in ("role", "content"):
            text(message.get(name), f"{field}[{number}].{name}")
    return value


def text(value: Any, field: str) -> str:
    """The text in a field.

    Raises:
      BadLine: it is none.
    """
    if not isinstance(value, str):
        raise BadLine(f"{field} is {'missing' if value is None else type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadLine(f"{field} has half a surrogate pair") from None
    return value


def specials(tokenizer: "Tokenizer") -> re.Pattern[str] | None:
    """Matches the name of any special token; None where there is none."""
    names = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    return re.compile("|".join(re.escape(name) for name in names)) if names else None


def check_plain(texts: Sequence[str], names: re.Pattern[str] | None) -> None:
    """A text from outside must not forge a turn of the conversation.

    Raises:
      BadLine: a special token's name is in it.
    """
    for each in texts:
        if names and (found := names.search(each)):
            raise BadLine(f"a text holds {found.group()}, the name of a special token")


def learnt(template: Template, said: Sequence[Message], first: int = 0) -> Learnt:
    """The conversation as the template writes it; to be learnt is what the assistant says, from message `first` on.

    Raises:
      BadLine: there is no such message, or the template cannot write the conversation.
    """
    answers = [n for n, message in enumerate(said) if message["role"] == "assistant" and n >= first]
    if not answers:
        raise BadLine("no message of the assistant")
    if answers[0] == 0:
        raise BadLine("it begins with the assistant")
    try:
        whole = chat.render(template, said, prompt=False)
        return Learnt(whole, tuple(_span(template, said, n, whole) for n in answers))
    except Refused as refusal:
        if refusal.code != DATA:  # no Jinja here
            raise
        raise BadLine(str(refusal).partition(": give turns")[0]) from None


def _span(template: Template, said: Sequence[Message], n: int, whole: str) -> tuple[int, int]:
    """Where message n stands in the whole, with what the template ends it with."""
    opened = chat.render(template, said[:n], prompt=True)
    start = _alike(whole, opened)
    if start < len(opened) and not whole.startswith(chat.render(template, said[:n], prompt=False)):
        raise BadLine(f"the template does not render the messages before message {n} where they stand")
    closed = chat.render(template, said[: n + 1], prompt=False)
    if whole.startswith(closed):
        return start, len(closed)
    content = said[n]["content"].strip()  # templates may write a turn otherwise when others follow, but its words stay
    at, own = whole.find(content, start), closed.rfind(content)
    if at < 0 or own < 0:
        raise BadLine(f"the template does not render the content of message {n} as it is")
    tail = closed[own + len(content) :]
    return start, at + len(content) + _alike(whole[at + len(content) :], tail)


def _alike(a: str, b: str) -> int:
    """How many characters two texts have in common from their start."""
    if a.startswith(b):
        return len(b)
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
