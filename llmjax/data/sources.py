"""What `llmjax data build` reads: files and folders, cut into units of work that nothing but the sources decides."""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from llmjax.data import places, records, tokenfiles
from llmjax.data.places import File
from llmjax.data.tokenfiles import TokenFile
from llmjax.errors import DATA, Refused

_LINES = (".jsonl", ".ndjson")
_PACKED = (".gz", ".zst", ".zstd")


class Unit(NamedTuple):
    """What becomes one shard of each split."""

    read: tuple[Callable[[], Iterator[records.Piece | records.Bad]], ...] = ()
    "Readers of its files, one after another."
    tokens: TokenFile | None = None
    "Or a token file, left in place."
    side: str = ""
    "The split that all of it goes to; nothing: each document is drawn."
    source: int = 0
    "Which source it is of, to be counted."


class Source(NamedTuple):
    """A source as it was found."""

    path: str
    files: list[File]


def find(path: str, only: Sequence[str], option: str = "--source") -> Source:
    """The files of a source, sorted by name; in a folder those that end with one of `only`, if there is any.

    Raises:
      Refused: nothing is there (code 65), or what reads it is not installed (code 2).
    """
    found = places.files(path, option)
    if only and not _alone(Source(path, found)):
        found = [file for file in found if file.name.endswith(tuple(only))]
    if not found:
        raise Refused(f"{option} '{path}' has no file that ends with {' or '.join(only)}: change --only.", DATA)
    return Source(path, found)


def _alone(source: Source) -> bool:
    """Whether a file was given by itself, and no folder."""
    if places.remote(source.path):
        return len(source.files) == 1 and source.path.endswith(f"/{source.files[0].name}")
    return Path(source.path).expanduser().is_file()


def split(name: str, side: str, heldout: float) -> str:
    """The split of a document: that of its source, or drawn by its name as `corpus.split` draws files."""
    if side or not heldout:
        return side or "train"
    draw = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64
    return "heldout" if draw < heldout else "train"


def kind(name: str) -> str:
    """How a file is read: .jsonl, .parquet, .arrow, .bin, .idx, or nothing for a text."""
    packed = name.endswith(_PACKED)
    ending = Path(name).with_suffix("").suffix if packed else Path(name).suffix
    if ending in _LINES or (packed and ending == ".json"):
        return ".jsonl"
    return ending if ending in (".parquet", ".arrow", ".bin", ".idx") and not packed else ""


def units(number: int, source: Source, field: str, vocab: int, size: int, side: str) -> Iterator[Unit]:
    """Cuts a source into units of about `size` bytes.

    Whole text files together, lines of a JSONL file, row groups of a Parquet file; a compressed file, an Arrow file or
    a token file is one. A `.bin` that is given by itself holds tokens; in a folder it must say so.
    """
    texts, held = [], 0
    for file in source.files:
        parts = _parts(file, field, vocab, size, _alone(source))
        if parts is None:
            texts.append(functools.partial(records.text, file.name, file.path))
            held += file.size
        if texts and (parts is not None or held >= size):
            yield Unit(tuple(texts), side=side, source=number)
            texts, held = [], 0
        for part in parts or ():
            yield part._replace(side=side or ("train" if part.tokens else ""), source=number)
    if texts:
        yield Unit(tuple(texts), side=side, source=number)


def _parts(file: File, field: str, vocab: int, size: int, alone: bool) -> list[Unit] | None:
    """The units of a file that is more than one text; None for a text."""
    match kind(file.name):
        case ".jsonl":
            whole = file.name.endswith(_PACKED)
            cuts = [0, 1 << 62] if whole else [*range(0, max(file.size, 1), size), file.size]
            return _spans(records.jsonl, file, field, cuts)
        case ".parquet":
            return _spans(records.parquet, file, field, _row_groups(file.path, field, size))
        case ".arrow":
            return _spans(records.arrow, file, field, [0, 1])
        case ".bin" | ".idx" if places.remote(file.path):
            raise Refused(f"'{file.path}' holds tokens, which are read in place: copy it to a local folder.", DATA)
        case ".bin":
            path = Path(file.path)
            tokens = tokenfiles.recognise(path) or (tokenfiles.plain(path, vocab) if alone else None)
            return [Unit(tokens=tokens)] if tokens else None
        case ".idx" if tokenfiles.recognise(Path(file.path).with_suffix(".bin")):
            return []
    return None


def _spans(read: Callable, file: File, field: str, cuts: list[int]) -> list[Unit]:
    return [
        Unit((functools.partial(read, file.name, file.path, field, low, high),))
        for low, high in itertools.pairwise(cuts)
    ]


def _row_groups(path: str, field: str, size: int) -> list[int]:
    """Where to cut a Parquet file, in row groups."""
    with records.arrow_errors(path) as pyarrow:
        import pyarrow.parquet

        opened = pyarrow.PythonFile(places.opened(path), "r")
        with opened, pyarrow.parquet.ParquetFile(opened) as file:
            if field not in file.schema_arrow.names:
                has = ", ".join(file.schema_arrow.names)
                raise Refused(f"'{path}' has no column '{field}' (it has {has}): name one with --field.", DATA)
            weights = [file.metadata.row_group(n).total_byte_size for n in range(file.num_row_groups)]
    cuts, held = [0], 0
    for number, weight in enumerate(weights):
        if held and held + weight > size:
            cuts.append(number)
            held = 0
        held += weight
    return [*cuts, len(weights)]
