"""Finds the documents of a corpus, reads them, and holds some of them out.

A document is a file: a name relative to the corpus, with `/` between folders on every system, and its text.
"""

import dataclasses
import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from llmjax.errors import DATA, USAGE, Refused

_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True)
class Document:
    """One text of a corpus."""

    name: str
    text: str
    "The file's text; `text.encode()` gives back the file's bytes, line ends included."


def standard_library() -> list[tuple[str, Path]]:
    """Every `.py` file of this Python's standard library, sorted by name.

    Installed packages and the library's own tests are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    return [found for found in _walk(root, keep=lambda part: part not in _NOT_LIBRARY) if found[0].endswith(".py")]


def files(path: str | Path) -> list[tuple[str, Path]]:
    """A text file, or every file below a folder, sorted by name.

    Links are followed, each folder is entered once, and names that begin with a dot are skipped.

    Raises:
      Refused: nothing is at `path`, or the folder holds no file (code 65).
    """
    root = Path(path).expanduser()
    if root.is_dir():
        found = _walk(root, keep=lambda part: not part.startswith("."))
        if not found:
            raise Refused(f"data.path '{path}' is a folder without files: put text files (UTF-8) into it.", DATA)
        return found
    if not root.exists():
        raise Refused(f"data.path '{path}' does not exist: give a text file or a folder of text files.", DATA)
    return [(root.name, root)]


def _walk(root: Path, keep: Callable[[str], bool]) -> list[tuple[str, Path]]:
    found, entered = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:  # a link back to a folder already seen
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(part for part in folders if keep(part))
        paths = [Path(folder, name) for name in names if keep(name)]
        # A link to nothing is kept, to be refused by name when it is read; sockets and pipes are no documents.
        found += [(p.relative_to(root).as_posix(), p) for p in paths if p.is_file() or not p.exists()]
    return sorted(found)


def some(found: Sequence[tuple[str, Path]], size: int) -> list[tuple[str, Path]]:
    """Whole files of about `size` bytes together, drawn by the SHA-256 of their names; sorted by name.

    Each is taken, in the order of the draw, unless it leads past `size`: so the same files come to the same choice
    anywhere, and no file is more than the rest of it. At least one is taken.
    """

    def draw(one: tuple[str, Path]) -> bytes:
        return hashlib.sha256(b"some " + one[0].encode("utf-8", "surrogateescape")).digest()  # not the draw of `split`

    drawn, left = sorted(found, key=draw), size
    taken = []
    for name, path in drawn:
        length = path.stat().st_size if path.exists() else 0  # one that is gone is refused when it is read
        if length <= left:
            taken.append((name, path))
            left -= length
    return sorted(taken or drawn[:1])


def read(found: Iterable[tuple[str, Path]], *, skip_other_codings: bool = False) -> tuple[list[Document], int]:
    """Reads files as UTF-8, exactly: no newline is translated. Empty files are left out.

    Returns:
      The documents, and how many files were skipped because they declare another coding in their first two lines
      as Python sources may (PEP 263). None is skipped unless `skip_other_codings`.

    Raises:
      Refused: a file is missing, unreadable or not UTF-8, or all are empty (code 65).
    """
    documents, skipped, path = [], 0, None
    for name, path in found:
        try:
            text = path.read_bytes().decode()
        except OSError as error:
            raise Refused(f"'{path}' cannot be read ({error.strerror}): restore the file or remove it.", DATA) from None
        except UnicodeDecodeError as error:
            if skip_other_codings and _declares_other_coding(path):
                skipped += 1
                continue
            raise Refused(
                f"'{path}' is not UTF-8 (byte {error.start}): convert it to UTF-8 or take it out of the corpus.", DATA
            ) from None
        if text:
            documents.append(Document(name, text))
    if not documents:
        raise Refused(f"the corpus is empty: '{path}' holds no text; give files with text.", DATA)
    return documents, skipped


def _declares_other_coding(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            return tokenize.detect_encoding(file.readline)[0] not in ("utf-8", "utf-8-sig")
        except SyntaxError:  # no declaration, and not UTF-8 either
            return False


def split(names: Iterable[str], fraction: float) -> tuple[list[str], list[str]]:
    """Splits names into training and held-out, each name on its own by its SHA-256.

    About `fraction` of the names is held out. A name's side never depends on the other names, so files added later
    do not move text between the sides. Either side may come out empty.

    Raises:
      Refused: `fraction` is not strictly between 0 and 1 (code 2).
    """
    if not 0 < fraction < 1:
        raise Refused(f"data.heldout is {fraction}: give a fraction of the files above 0 and below 1.", USAGE)
    train, heldout = [], []
    for name in names:
        draw = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64
        (heldout if draw < fraction else train).append(name)
    return train, heldout


def hold_out(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Splits a corpus into training and held-out documents.

    Whole files as `split` says, but a file that alone would be more than half of the held-out text is always
    trained on: an average over files should not be the score of one. Where that would leave a side empty, as with a
    single file, the end of the corpus is held out instead, cut at the end of the line that is nearest before the last
    `fraction`.

    Raises:
      Refused: `fraction` is out of range (code 2), or there is too little text for two sides (code 65).
    """
    largest = sum(len(d.text) for d in documents) * fraction / 2
    chosen = set(split((d.name for d in documents), fraction)[1])
    heldout = {d.name for d in documents if d.name in chosen and len(d.text) <= largest}
    train = {d.name for d in documents} - heldout
    if train and heldout:
        return [d for d in documents if d.name in train], [d for d in documents if d.name in heldout]
    return _cut(documents, fraction)


def _cut(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    total = sum(len(d.text) for d in documents)
    left = max(1, min(total - 1, round(total * (1 - fraction))))
    train, heldout = [], []
    for document in documents:
        at = max(0, min(left, len(document.text)))
        left -= len(document.text)
        if 0 < at < len(document.text):
            # where the lines are huge, the character itself is a better place than a line end far away
            at = document.text.rfind("\n", at // 2, at) + 1 or at
        train.append(Document(document.name, document.text[:at]))
        heldout.append(Document(document.name, document.text[at:]))
    train, heldout = [d for d in train if d.text], [d for d in heldout if d.text]
    if not train or not heldout:
        raise Refused(
            f"'{documents[0].name}' holds {total} characters, too few to hold out {fraction:g} of it: give more text.",
            DATA,
        )
    return train, heldout
