"""Where sources lie: files and folders of this machine, remote ones through fsspec, data sets of the Hugging Face hub.

A remote place is what fsspec understands, such as gs://bucket/folder, s3://..., az://... or file:///..., with that
scheme's package installed. `hf://OWNER/NAME[/CONFIG][:SPLIT]`, or `hf:///FOLDER`, is a data set as the `datasets`
library loads it: it downloads into its own cache, and the Arrow files there are read.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from llmjax.data import corpus
from llmjax.errors import DATA, USAGE, Refused, did_you_mean

HUB = "hf://"


class File(NamedTuple):
    """A file as it was found."""

    name: str
    "Relative to its source, with /."
    path: str
    "A local path, or a URL."
    size: int
    written: int
    "Changes when the file does."


def remote(path: str) -> bool:
    """Whether this is no local path."""
    return "://" in path


def local(path: str, option: str) -> Path:
    """A place to write to, or to map, refused where it is remote (code 2)."""
    if remote(path):
        raise Refused(
            f"{option} '{path}' is not a local path: stores are read in place, so give a local folder.", USAGE
        )
    return Path(path).expanduser()


def files(path: str, option: str = "--source") -> list[File]:
    """The files at a place, sorted by name.

    Raises:
      Refused: nothing is there, or what reads it is not installed (code 65).
    """
    if path.startswith(HUB):
        return [_local(Path(name).name, Path(name)) for name in _hub(path, option)]
    if remote(path):
        return _remote(path, option)
    root = Path(path).expanduser()
    if not root.exists():
        near = did_you_mean(root.name, [p.name for p in root.parent.glob("*")] if root.parent.is_dir() else [])
        raise Refused(f"{option} '{path}' does not exist: {near}give a file or a folder.", DATA)
    return [_local(name, found) for name, found in corpus.files(path)]


def _local(name: str, path: Path) -> File:
    with contextlib.suppress(OSError):  # a link to nothing is refused by name when it is read
        found = path.stat()
        return File(name, str(path), found.st_size, found.st_mtime_ns)
    return File(name, str(path), 0, 0)


def _remote(path: str, option: str) -> list[File]:
    with _explained(path, option):
        import fsspec

        system, root = fsspec.core.url_to_fs(path)
        found = system.find(root, detail=True)
        if not found:
            raise Refused(f"{option} '{path}' does not exist, or is empty: give a file or a folder.", DATA)
        listed = []
        for at, facts in found.items():
            name = at[len(root) :].strip("/") or at.rpartition("/")[2]
            if not any(part.startswith(".") for part in name.split("/")):
                marks = [str(facts.get(key)) for key in ("mtime", "ETag", "etag", "md5Hash", "updated", "LastModified")]
                written = int.from_bytes(hashlib.sha256(repr(marks).encode()).digest()[:8])
                listed.append(File(name, system.unstrip_protocol(at), facts["size"], written))
    return sorted(listed)


def _hub(path: str, option: str) -> list[str]:
    try:
        import datasets
    except ImportError:
        raise Refused(f"{option} '{path}' needs datasets: pip install 'llmjax[hub]'.", USAGE) from None
    name, _, split = path[len(HUB) :].partition(":")
    parts = name.split("/")
    owner, config = (name, None) if name[:1] in "/." else ("/".join(parts[:2]), "/".join(parts[2:]) or None)
    with _explained(path, option):
        loaded = datasets.load_dataset(owner, config, split=split or "train")
    if "[" in split or not loaded.cache_files:
        raise Refused(f"{option} '{path}' is not a whole split: name one, as in {HUB}{name}:train.", DATA)
    return [one["filename"] for one in loaded.cache_files]


@contextlib.contextmanager
def _explained(path: str, option: str) -> Iterator[None]:
    """What the libraries of remote places raise, of which there is no list, as one sentence."""
    try:
        yield
    except Refused:
        raise
    except ImportError as error:  # of fsspec, which names the package
        raise Refused(f"{option} '{path}' needs a package: {error}.", USAGE) from None
    except Exception as error:
        why = " ".join(f"{error}".split())
        raise Refused(
            f"{option} '{path}' cannot be read ({type(error).__name__}: {why:.200}): check its name and your access.",
            DATA,
        ) from None


def opened(path: str) -> IO[bytes]:
    """The bytes of a file, seekable."""
    if not remote(path):
        return Path(path).open("rb")
    import fsspec

    return fsspec.open(path, "rb").open()
