"""Reads the documents of a source as a stream: no more than one record, or a piece of a long text, is held at once.

A reader yields a `Piece` for each part of a document, `first` where one begins, or a `Bad` for what is none.
"""

import codecs
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

from llmjax.data import places
from llmjax.errors import DATA, Refused

PIECE = 1 << 20  # characters of a text that are read at once
LONGEST = 1 << 28  # bytes of a record; a longer one is bad


class Piece(NamedTuple):
    """A document, or a part of one."""

    name: str
    text: str
    first: bool = True


class Bad(NamedTuple):
    """What is no document: where it is, and why."""

    name: str
    reason: str


def text(name: str, path: str) -> Iterator[Piece | Bad]:
    """One file as one document; an empty one gives one empty piece."""
    try:
        for _ in _decoded(path):  # to the end before a part of it is taken
            pass
        first = True
        for part in _cut(_decoded(path)):
            yield Piece(name, part, first)
            first = False
        if first:
            yield Piece(name, "")
    except UnicodeDecodeError as error:
        yield Bad(name, f"not UTF-8 ({error.reason})")
    except (OSError, EOFError, zlib.error) as error:
        yield Bad(name, f"cannot be read ({getattr(error, 'strerror', None) or error})")


def jsonl(name: str, path: str, field: str, start: int, stop: int) -> Iterator[Piece | Bad]:
    """The texts of the lines that begin at bytes `start` to `stop - 1` of a file, after decompression."""
    try:
        with _opened(path) as file:
            at = start
            if start:  # the line that this falls into belongs to those before
                file.seek(start - 1)
                at = start - 1 + _skip_line(file)
            while at < stop and (line := file.readline(LONGEST)):
                where, at = f"{name}@{at}", at + len(line)
                if len(line) == LONGEST and not line.endswith(b"\n"):
                    at += _skip_line(file)
                    yield Bad(where, f"longer than {LONGEST:,} bytes")
                elif line.strip():
                    yield from _parts(_parsed(where, line, field))
    except (OSError, EOFError, zlib.error) as error:
        yield Bad(name, f"cannot be read ({getattr(error, 'strerror', None) or error})")


def strings(name: str, path: str) -> Iterator[Piece | Bad]:
    """Every text anywhere in the records of a JSONL file."""
    at = 0
    with _opened(path) as file:
        while line := file.readline(LONGEST):
            where, at = f"{name}@{at}", at + len(line)
            try:
                yield from (Piece(where, text) for text in _strings(json.loads(line) if line.strip() else []))
            except (ValueError, RecursionError):
                yield Bad(where, "not JSON")


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _parsed(where: str, line: bytes, field: str) -> Piece | Bad:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        return Bad(where, f"not UTF-8 ({error.reason})")
    except (ValueError, RecursionError):
        return Bad(where, "not JSON")
    if not isinstance(value, dict) or field not in value:
        return Bad(where, f"no field {field!r}")
    return _checked(where, value[field], field)


def _checked(where: str, value: object, field: str) -> Piece | Bad:
    if not isinstance(value, str):
        return Bad(where, f"field {field!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        return Bad(where, "half a surrogate pair")
    return Piece(where, value)


def parquet(name: str, path: str, field: str, start: int, stop: int) -> Iterator[Piece | Bad]:
    """The texts of row groups `start` to `stop - 1`."""
    with arrow_errors(path) as pyarrow:
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(pyarrow.PythonFile(places.opened(path), "r"))
        row = sum(file.metadata.row_group(group).num_rows for group in range(start))
        try:
            for batch in file.iter_batches(256, range(start, stop), [field]):
                yield from _column(name, batch.column(0), field, row)
                row += batch.num_rows
        except (OSError, pyarrow.ArrowInvalid) as error:
            yield Bad(f"{name}@{row}", f"cannot be read ({error})")


def arrow(name: str, path: str, field: str, start: int, stop: int) -> Iterator[Piece | Bad]:
    """The texts of an Arrow file, or a stream as the `datasets` library keeps them."""
    with arrow_errors(path) as pyarrow, _arrow_file(pyarrow, path) as file:
        row = 0
        for batch in arrow_batches(pyarrow, file):
            for at in range(0, batch.num_rows, 256):
                yield from _column(name, batch.column(field).slice(at, 256), field, row + at)
            row += batch.num_rows


def _arrow_file(pyarrow, path: str):
    return pyarrow.PythonFile(places.opened(path), "r") if places.remote(path) else pyarrow.memory_map(path)


def arrow_batches(pyarrow, file) -> Iterator:
    """The batches of either form of Arrow's own format."""
    try:
        found = pyarrow.ipc.open_file(file)
    except pyarrow.ArrowInvalid:
        file.seek(0)
        yield from pyarrow.ipc.open_stream(file)
        return
    for n in range(found.num_record_batches):
        yield found.get_batch(n)


@contextlib.contextmanager
def arrow_errors(path: str) -> Iterator:
    """Imports pyarrow, and refuses a file that it cannot read (code 65)."""
    try:
        import pyarrow
    except ImportError:
        raise Refused(f"'{path}' needs pyarrow: pip install 'llmjax[data]'.") from None
    try:
        yield pyarrow
    except (pyarrow.ArrowException, KeyError) as error:
        why = " ".join(str(error).split())
        raise Refused(f"'{path}' cannot be read ({why:.200}): give a whole file, and --field.", DATA) from None


def _column(name: str, column, field: str, row: int) -> Iterator[Piece | Bad]:
    for number, value in enumerate(column.to_pylist()):
        yield from _parts(_checked(f"{name}@{row + number}", value, field))


def _parts(found: Piece | Bad) -> Iterator[Piece | Bad]:
    """A record's text in pieces, where it is long: encoding takes a hundred times the memory of its text."""
    if isinstance(found, Bad) or len(found.text) <= 2 * PIECE:
        yield found
        return
    parts = (found.text[at : at + PIECE] for at in range(0, len(found.text), PIECE))
    for n, part in enumerate(_cut(parts)):
        yield Piece(found.name, part, n == 0)


def _opened(path: str) -> IO[bytes]:
    if path.endswith(".gz"):
        return gzip.open(places.opened(path), "rb")
    if path.endswith((".zst", ".zstd")):
        with arrow_errors(path) as pyarrow:
            return io.BufferedReader(
                pyarrow.CompressedInputStream(pyarrow.PythonFile(places.opened(path), "r"), "zstd")
            )
    return places.opened(path)


def _skip_line(file: IO[bytes]) -> int:
    """Reads to the end of a line and returns its bytes."""
    count = 0
    while part := file.readline(PIECE):
        count += len(part)
        if part.endswith(b"\n"):
            break
    return count


def _decoded(path: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _opened(path) as file:
        while block := file.read(PIECE):
            yield decoder.decode(block)
        yield decoder.decode(b"", final=True)


def _cut(parts: Iterator[str]) -> Iterator[str]:
    """Cuts a long text before line ends, where byte-level tokenizers begin a new token anyway.

    Where the lines are huge it is cut anywhere, rather than hold all of it.
    """
    held = ""
    for part in parts:
        held += part
        if len(held) > 2 * PIECE:
            at = _line_end(held) or (len(held) if len(held) > 16 * PIECE else 0)
            if at:
                yield held[:at]
            held = held[at:]
    if held:
        yield held


def _line_end(text: str) -> int:
    """The last line end that follows no blank, or 0."""
    at = text.rfind("\n")
    while at > 0 and text[at - 1].isspace():
        at = text.rfind("\n", 0, at)
    return max(at, 0)
