"""A token store: one folder with the tokens of a corpus and a record of where they came from.

    train.bin, heldout.bin   the documents' tokens one after another, each document preceded by the end of text
    tokenizer.json           the tokenizer that wrote them
    dataset.json             provenance, sizes, hashes, baselines

A store appears by renaming a finished folder: a killed build leaves none, and of two builds at once one wins.
"""

import concurrent.futures
import dataclasses
import gzip
import hashlib
import json
import lzma
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmjax import reading, redact
from llmjax.data.corpus import Document, hold_out
from llmjax.data.folders import at_once
from llmjax.data.onfile import OnFile, check_file
from llmjax.data.tokenizer import BPE, Bytes, TokenizerFile, end_of_text, vocabulary
from llmjax.errors import DATA, IO, Refused

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = 2  # raise it when the meaning of the files changes: old stores are then left alone and built anew
FILES = ("train.bin", "heldout.bin", "tokenizer.json")
_CHUNK = 1 << 20  # characters encoded at once: enough to keep all cores busy, little enough for memory


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
    """An open token store."""

    folder: Path
    record: dict
    "What dataset.json says."
    train: OnFile
    "Token ids."
    heldout: OnFile
    "Token ids."


def key(documents: Sequence[Document], tokenizer: BPE | Bytes | TokenizerFile, fraction: float) -> str:
    """The store's name: a hash of everything that decides its content."""
    digest = hashlib.sha256(f"{FORMAT} {fraction!r} {tokenizer.identity()}".encode())
    for document in documents:
        for part in (document.name.encode("utf-8", "surrogateescape"), document.text.encode()):
            digest.update(len(part).to_bytes(8))
            digest.update(part)
    return digest.hexdigest()[:24]


def ensure(
    documents: Sequence[Document],
    tokenizer: BPE | Bytes | TokenizerFile,
    fraction: float,
    *,
    source: str,
    cache: Path,
    say: Callable[[str], None],
) -> Store:
    """Opens the store of this corpus below `cache`, building it first if it is not there.

    Raises:
      Refused: the corpus cannot be split or the store is damaged (code 65), or `cache` cannot be written (code 74).
    """
    folder = cache / key(documents, tokenizer, fraction)
    if not folder.exists():
        train, heldout = hold_out(documents, fraction)
        try:
            build(train, heldout, tokenizer, source=source, folder=folder, say=say)
        except OSError as error:
            raise Refused(
                f"'{cache}' cannot take the token store ({error.strerror or error}): free some space there or choose "
                "another folder for the run.",
                IO,
            ) from None
    return open_store(folder)


def build(
    train: Sequence[Document],
    heldout: Sequence[Document],
    tokenizer: BPE | Bytes | TokenizerFile,
    *,
    source: str,
    folder: Path,
    say: Callable[[str], None],
) -> None:
    """Writes a store to `folder`, all at once; if another build was faster, its store stays."""
    with at_once(folder) as unfinished:
        _write(train, heldout, tokenizer, source=source, folder=unfinished, say=say)


def _write(
    train: Sequence[Document],
    heldout: Sequence[Document],
    tokenizer: BPE | Bytes | TokenizerFile,
    *,
    source: str,
    folder: Path,
    say: Callable[[str], None],
) -> None:
    sides = {"train": train, "heldout": heldout}
    counts = {side: sum(len(d.text.encode()) for d in documents) for side, documents in sides.items()}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # the compressors leave the interpreter lock alone
        compressed = {
            "gzip": pool.submit(_bits_per_byte, heldout, lambda data: gzip.compress(data, 9, mtime=0)),
            "xz": pool.submit(_bits_per_byte, heldout, lambda data: lzma.compress(data, preset=9)),
        }
        say(f"Tokenizer {tokenizer}: from {len(train)} training documents, {counts['train'] / 1e6:.1f} MB.")
        built = tokenizer.build(d.text for d in train)
        _write_file(folder / "tokenizer.json", [built.to_str(pretty=True).encode()])
        vocab, end = vocabulary(built), end_of_text(built)
        dtype = np.dtype("<u2" if vocab <= 1 << 16 else "<u4")
        say(f"Tokens: encoding {sum(counts.values()) / 1e6:.1f} MB with a vocabulary of {vocab}.")
        tokens = {side: _encode(built, end, texts, dtype, folder / f"{side}.bin") for side, texts in sides.items()}
        baselines = {name: future.result() for name, future in compressed.items()}
    written = [folder / name for name in FILES]
    hashes = {path.name: _hash_file(path) for path in written}
    record = {
        "format": FORMAT,
        "fingerprint": _fingerprint(hashes),
        "source": redact.text(source),
        "tokenizer": redact.text(repr(tokenizer)),
        "vocab": vocab,
        "end_of_text": end,
        "dtype": dtype.str,
        **{
            side: {"documents": len(texts), "bytes": counts[side], "tokens": tokens[side]}
            for side, texts in sides.items()
        },
        "baselines": baselines,
        "sha256": hashes,
        "sizes": {path.name: path.stat().st_size for path in written},
        "files": {
            side: {d.name: hashlib.sha256(d.text.encode()).hexdigest() for d in texts} for side, texts in sides.items()
        },
        "versions": {"python": platform.python_version(), "tokenizers": metadata.version("tokenizers")},
    }
    _write_file(folder / "dataset.json", [_text(record)])


def _encode(tokenizer: "Tokenizer", end: int, documents: Sequence[Document], dtype: np.dtype, path: Path) -> int:
    """Writes the documents' tokens, each document preceded by `end`, and returns their number."""

    def arrays() -> Iterator[np.ndarray]:
        for chunk in _chunks(documents):
            for first, encoding in zip(
                (first for first, _ in chunk),
                tokenizer.encode_batch_fast([text for _, text in chunk], add_special_tokens=False),
                strict=True,
            ):
                yield np.array([end] * first + encoding.ids, dtype)

    return _write_file(path, (array.tobytes() for array in arrays())) // dtype.itemsize


def _chunks(documents: Sequence[Document]) -> Iterator[list[tuple[bool, str]]]:
    """Groups texts into chunks of about `_CHUNK` characters: pairs of (begins a document, text)."""
    chunk, size = [], 0
    for document in documents:
        for number, text in enumerate(_pieces(document.text)):
            chunk.append((number == 0, text))
            size += len(text)
            if size >= _CHUNK:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def _pieces(text: str) -> Iterator[str]:
    """Cuts a long text before line ends, where byte-level tokenizers begin a new token anyway."""
    start = 0
    while len(text) - start > _CHUNK:
        cut = text.find("\n", start + _CHUNK)
        while cut >= 0 and text[cut - 1].isspace():
            cut = text.find("\n", cut + 1)
        if cut < 0:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]


def _bits_per_byte(documents: Iterable[Document], compress: Callable[[bytes], bytes]) -> float:
    sizes = [(len(compress(data)), len(data)) for data in (d.text.encode() for d in documents)]
    return 8 * sum(small for small, _ in sizes) / sum(large for _, large in sizes)


def _write_file(path: Path, blocks: Iterable[bytes]) -> int:
    with path.open("wb") as file:
        size = sum(file.write(block) for block in blocks)
        file.flush()
        os.fsync(file.fileno())
    return size


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_store(folder: Path) -> Store:
    """Opens a store, of which every byte is read and compared with its record: about half a second per GB.

    That is less than `ensure` has already spent on reading and hashing the texts, whose tokens are the smaller half.

    Raises:
      Refused: a file is missing, unreadable, a symbolic link, or not what was written (code 65).
    """
    remedy = f"delete the folder '{folder}' and start again to rebuild it."
    try:
        text = reading.content(folder / "dataset.json", reading.RECORD)
        record = reading.parsed(text)
        dtypes = {np.dtype(name).str: np.dtype(name) for name in ("<u2", "<u4")}
        dtype, tokens = dtypes[record["dtype"]], {side: int(record[side]["tokens"]) for side in ("train", "heldout")}
        sizes, hashes = ({name: record[kind][name] for name in FILES} for kind in ("sizes", "sha256"))
        counted = all(sizes[f"{side}.bin"] == count * dtype.itemsize for side, count in tokens.items())
        whole = counted and record["fingerprint"] == _fingerprint(hashes) and _text(record) == text
    except OSError as error:
        raise Refused(f"'{error.filename}' cannot be read ({error.strerror}): {remedy}", DATA) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise Refused(f"'{folder / 'dataset.json'}' is damaged: {remedy}", DATA)
    for name in FILES:
        check_file(folder / name, sizes[name], remedy)
        if (folder / name).is_symlink() or _hash_file(folder / name) != hashes[name]:
            raise Refused(f"'{folder / name}' holds other bytes than were written: {remedy}", DATA)
    sides = {side: OnFile(folder / f"{side}.bin", dtype, count) for side, count in tokens.items()}
    return Store(folder, record, **sides)


def _text(record: dict[str, Any]) -> bytes:
    """The one form of a record, with its own sha256."""
    facts = {name: value for name, value in record.items() if name != "record"}
    return (json.dumps(facts | {"record": _fingerprint(facts)}, indent=1) + "\n").encode()


def _fingerprint(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
