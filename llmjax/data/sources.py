"""What `llmjax data build` reads: files and folders, cut into units of work that nothing but the sources decides."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from llmjax.data import corpus, records, tokenfiles
from llmjax.data.tokenfiles import TokenFile
from llmjax.errors import DATA, Refused, did_you_mean

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
    files: list[tuple[str, Path]]


def find(path: str, only: Sequence[str]) -> Source:
    """The files of a source, sorted by name; in a folder those that end with one of `only`, if there is any.

    Raises:
      Refused: nothing is there, or it is no local path (code 65).
    """
    if "://" in path:
        raise Refused(f"--source '{path}' is not a local path: download it, then give its folder.", DATA)
    root = Path(path).expanduser()
    if not root.exists():
        near = did_you_mean(root.name, [p.name for p in root.parent.glob("*")] if root.parent.is_dir() else [])
        raise Refused(f"--source '{path}' does not exist: {near}give a file or a folder.", DATA)
    found = corpus.files(path)
    if root.is_dir() and only:
        found = [(name, p) for name, p in found if name.endswith(tuple(only))]
    if not found:
        raise Refused(f"--source '{path}' has no file that ends with {' or '.join(only)}: change --only.", DATA)
    return Source(path, found)


def units(number: int, source: Source, field: str, vocab: int, size: int, side: str) -> Iterator[Unit]:
    """Cuts a source into units of about `size` bytes.

    Whole text files together, lines of a JSONL file, row groups of a Parquet file; a compressed file, an Arrow file or
    a token file is one. A `.bin` that is given by itself holds tokens; in a folder it must say so.
    """
    alone = len(source.files) == 1 and Path(source.path).expanduser().is_file()
    texts, held = [], 0
    for name, path in source.files:
        parts = _parts(name, path, field, vocab, size, alone)
        if parts is None:
            texts.append(functools.partial(records.text, name, str(path)))
            held += path.stat().st_size if path.exists() else 0
        if texts and (parts is not None or held >= size):
            yield Unit(tuple(texts), side=side, source=number)
            texts, held = [], 0
        for part in parts or ():
            yield part._replace(side=side or ("train" if part.tokens else ""), source=number)
    if texts:
        yield Unit(tuple(texts), side=side, source=number)


def _parts(name: str, path: Path, field: str, vocab: int, size: int, alone: bool) -> list[Unit] | None:
    """The units of a file that is more than one text; None for a text."""
    packed = name.endswith(_PACKED)
    ending = Path(name).with_suffix("").suffix if packed else Path(name).suffix
    if ending in _LINES or (packed and ending == ".json"):
        bytes_ = path.stat().st_size
        cuts = [0, 1 << 62] if packed else [*range(0, max(bytes_, 1), size), bytes_]
        return _spans(records.jsonl, name, path, field, cuts)
    if ending == ".parquet":
        return _spans(records.parquet, name, path, field, _row_groups(path, field, size))
    if ending == ".arrow":
        return _spans(records.arrow, name, path, field, [0, 1])
    if ending == ".bin":
        tokens = tokenfiles.recognise(path) or (tokenfiles.plain(path, vocab) if alone else None)
        return [Unit(tokens=tokens)] if tokens else None
    if ending == ".idx" and tokenfiles.recognise(path.with_suffix(".bin")):
        return []
    return None


def _spans(read: Callable, name: str, path: Path, field: str, cuts: list[int]) -> list[Unit]:
    return [
        Unit((functools.partial(read, name, str(path), field, low, high),)) for low, high in itertools.pairwise(cuts)
    ]


def _row_groups(path: Path, field: str, size: int) -> list[int]:
    """Where to cut a Parquet file, in row groups."""
    with records.arrow_errors(str(path)):
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
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
