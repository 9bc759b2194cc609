"""What a checkpoint was when it was written: MANIFEST.json with the size and sha256 of every file, and its proof.

Orbax loads a flipped bit in an array without a word. Here one changed byte in any file of a step, in the manifest too,
is found. Only names that a walk of the step's own folder found are opened, and no symbolic link is followed, so nothing
a manifest says can lead outside. It is JSON: nothing that is read is executed.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path, PurePosixPath
from typing import Any

NAME = "MANIFEST.json"
VERIFIED = "VERIFIED"  # an empty file, so that it holds no byte that could flip; its date says when
FORMAT = 1
LARGEST = 2**26  # bytes of a manifest: half a million files


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A whole manifest."""

    files: dict[str, tuple[int, str]]
    "Path inside the folder -> (bytes, sha256 as hex)."
    facts: dict[str, Any]
    "What was said of the step when it was saved: JSON."
    written: float
    "Seconds since 1970."

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())


def write(folder: Path, facts: dict[str, Any]) -> Manifest:
    """Writes the manifest of the files that are in `folder`, each read to its end; all is on the disk on return.

    Raises:
      OSError: something cannot be read or written.
      ValueError: the folder holds a symbolic link, or `facts` are not JSON.
    """
    found = {name: size for name, size in _files(folder).items() if name not in (NAME, VERIFIED)}
    files = {name: (size, _sha256(folder / name, drop=True)) for name, size in found.items()}
    manifest = Manifest(files, json.loads(json.dumps(facts)), time.time())
    scratch = folder / f".{NAME}.new"
    with scratch.open("wb") as file:
        file.write(_text(manifest))
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(folder / NAME)
    for path in {folder, *((folder / name).parent for name in files)}:
        sync(path)
    return manifest


def read(folder: Path) -> Manifest:
    """The manifest in a folder, if it is the one that was written, to the last byte.

    Raises:
      ValueError: with the reason why it is not.
    """
    try:
        with open(_unfollowed(folder / NAME), "rb") as file:
            text = file.read(LARGEST + 1)
    except FileNotFoundError as error:
        raise ValueError(f"it has no {NAME}") from error
    except OSError as error:
        raise ValueError(f"{NAME} cannot be read ({error.strerror})") from error
    if len(text) > LARGEST:
        raise ValueError(f"{NAME} is larger than any")
    try:
        found = json.loads(text)
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in found["files"].items()}
        manifest = Manifest(files, dict(found["facts"]), float(found["written"]))
        whole = _text(manifest) == text
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{NAME} is torn or damaged") from error
    if not whole:
        raise ValueError(f"{NAME} is damaged, or of another version")
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or str(path) != name:
            raise ValueError(f"{NAME} names {name!r}, which does not lie in its folder")
    return manifest


def damage(folder: Path, *, content: bool = True, threads: int = 1) -> str | None:
    """Why a folder is not what was written, in words; None if it is.

    Names and sizes are compared, and with `content` the sha256 of every file. A hidden file more, as file managers
    leave behind, does not count: neither Orbax nor TensorStore reads one.
    """
    try:
        manifest, found = read(folder), _files(folder)
        if (reason := _differs(manifest, found)) or not content:
            return reason
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            digests = pool.map(lambda name: _sha256(folder / name), manifest.files)
            for (name, (_, expected)), digest in zip(manifest.files.items(), digests, strict=True):
                if digest != expected:
                    pool.shutdown(cancel_futures=True)
                    return f"{name} holds other bytes than were written"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{os.path.basename(error.filename or '') or 'a file'} cannot be read ({error.strerror})"
    return None


def mark_verified(folder: Path) -> None:
    """Notes that the folder was read back now and is what was written; where it cannot be written, it is not noted."""
    with contextlib.suppress(OSError):
        (folder / VERIFIED).touch()


def verified(folder: Path) -> float | None:
    """When the folder was last read back and found whole (seconds since 1970); None: never."""
    try:
        return os.lstat(folder / VERIFIED).st_mtime
    except OSError:
        return None


def sync(folder: Path) -> None:
    """Brings a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _differs(manifest: Manifest, found: dict[str, int]) -> str | None:
    for name, (size, _) in manifest.files.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]:,} bytes of {size:,}"
    for name in sorted(found.keys() - manifest.files.keys() - {NAME}):
        hidden, mark = name.rpartition("/")[2].startswith("."), name == VERIFIED and found[name] == 0
        if not hidden and not mark:
            return f"{name} was not written with it"
    return None


def _files(folder: Path, inside: str = "") -> dict[str, int]:
    """Path inside the folder -> bytes, of all files; ValueError for what is neither file nor folder."""
    found: dict[str, int] = {}
    with os.scandir(folder / inside) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = f"{inside}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                found |= _files(folder, f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                found[name] = entry.stat(follow_symlinks=False).st_size
            else:
                raise ValueError(f"{name} is {'a symbolic link' if entry.is_symlink() else 'no file'}")
    return found


def _sha256(path: Path, *, drop: bool = False) -> str:
    """Of a file's content. With `drop` it is brought to the disk first and then leaves the memory, so that the next
    reading is of the disk."""
    with open(_unfollowed(path), "rb") as file:
        if drop:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if drop and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest


def _unfollowed(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def _text(manifest: Manifest) -> bytes:
    """The one form of a manifest, with its own sha256."""
    facts = dict(format=FORMAT, written=manifest.written, facts=manifest.facts, files=manifest.files)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return (json.dumps(facts | {"sha256": digest}, sort_keys=True, indent=1) + "\n").encode()
