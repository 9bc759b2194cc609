"""A folder with a Hugging Face checkpoint: config.json, tensors in one file or several, and the tokenizer's files."""

import dataclasses
import functools
import importlib
import pkgutil
from pathlib import Path
from typing import Any

import jax

from llmjax import reading
from llmjax.checkpoint.checkpoints import named
from llmjax.errors import DATA, IO, Refused
from llmjax.interop import configs, families, safetensors, weights
from llmjax.interop.configs import Family, Json
from llmjax.interop.safetensors import Entry

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TEXTS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


@functools.cache
def known() -> tuple[Family, ...]:
    """All families, one per file of `llmjax.interop.families`."""
    names = (module.name for module in pkgutil.iter_modules(families.__path__))
    return tuple(importlib.import_module(f"{families.__name__}.{name}").FAMILY for name in names)


def family_of(model: Any) -> Family:
    """The family of one of our configs.

    Raises:
      Refused: Hugging Face has no such model, as far as we know.
    """
    for family in known():
        if family.model is type(model):
            return family
    names = ", ".join(sorted(family.model.__name__ for family in known()))
    raise Refused(
        f"the run's model is a {type(model).__name__}, which has no form at Hugging Face: train one of {names}."
    )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a folder holds; nothing but headers has been read."""

    folder: Path
    config: Json
    family: Family
    model: Any
    "Our config."
    notes: list[str]
    "What is honoured differently, in sentences."
    tensors: dict[str, Entry]

    def load(self, like: Any) -> Any:
        """The weights, in the structure and at the places of `like`, an abstract model of our config.

        Every device reads its own slices, one parameter after another.

        Raises:
          Refused: a tensor is missing, unknown or of another shape.
        """
        wanted, parts = named(like), {w.ours: w for w in self.family.weights(self.model)}
        assert wanted.keys() == parts.keys(), wanted.keys() ^ parts.keys()
        weights.account(list(parts.values()), wanted, self.tensors, self.spare())
        loaded = [weights.load(parts[name], leaf, self.tensors) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), loaded)

    def spare(self) -> tuple[str, ...]:
        """Patterns of names of tensors that may be left over."""
        own = tuple(one.replace("{layers}", str(self.model.layers)) for one in self.family.spare)
        return (*own, r"^lm_head\.weight$") if getattr(self.model, "tied", False) else own

    def texts(self) -> dict[str, Path]:
        """The tokenizer's and other small files that are there."""
        return {name: path for name in TEXTS if (path := inside(self.folder, name)).is_file()}


def read(folder: Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
      Refused: a file is missing or no such file, the architecture is unknown, or its config is not honoured.
    """
    if not folder.is_dir():
        raise Refused(f"{folder} is no folder: give one with a Hugging Face checkpoint; nothing is downloaded.")
    config = _json(folder, CONFIG)
    family, model, notes = configs.read(known(), config)
    tensors = _tensors(folder)
    if family.prefix and not any(name.startswith(family.prefix) for name in tensors):
        tensors = {name if name == "lm_head.weight" else family.prefix + name: e for name, e in tensors.items()}
    return Checkpoint(folder, config, family, model, notes, tensors)


def inside(folder: Path, name: str) -> Path:
    """The path of a file in the folder.

    A symbolic link may lead within the folder or, as in the hub's cache, from a snapshot to the blobs beside it.

    Raises:
      Refused: the name or a link leads elsewhere.
    """
    path = folder / name
    if Path(name).name != name or not name.isprintable() or name in ("", ".", ".."):
        raise Refused(f"{folder} names a file {name!r:.80}, which does not lie in it: download it again.", DATA)
    real, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    if real.parent != home and not (home.parent.name == "snapshots" and real.parent == blobs):
        raise Refused(f"{path} is a link out of the folder: put the file itself in its place.", DATA)
    return path


def _tensors(folder: Path) -> dict[str, Entry]:
    if not inside(folder, INDEX).is_file():
        if inside(folder, SINGLE).is_file():
            return safetensors.header(folder / SINGLE)
        others = [path.name for path in folder.glob("pytorch_model*.bin")]
        why = f" ({others[0]} can run code when it is read: save the model as safetensors)" if others else ""
        raise Refused(f"{folder} has neither {SINGLE} nor {INDEX}{why}: give a folder with all files.", DATA)
    said = _json(folder, INDEX).get("weight_map")
    if not (isinstance(said, dict) and all(isinstance(file, str) for file in said.values())):
        raise Refused(f"{folder / INDEX} has no weight_map from names to files: download it again.", DATA)
    files = {file: safetensors.header(inside(folder, file)) for file in sorted(set(said.values()))}
    lost = [name for name, file in said.items() if name not in files[file]]
    unsaid = [name for file, found in files.items() for name in found if said.get(name) != file]
    if lost or unsaid:
        raise Refused(
            f"{folder / INDEX} and its files disagree on {', '.join((lost + unsaid)[:8])}: download them again.", DATA
        )
    return {name: files[file][name] for name, file in said.items()}


def _json(folder: Path, name: str) -> Json:
    path = inside(folder, name)
    try:
        found = reading.parsed(reading.content(path, reading.RECORD, follow=True))
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}): give a folder with all files.", IO) from error
    except ValueError as error:
        raise Refused(f"{path} is not JSON ({error}): download it again.", DATA) from error
    if not isinstance(found, dict):
        raise Refused(f"{path} holds no object: download it again.", DATA)
    return found
