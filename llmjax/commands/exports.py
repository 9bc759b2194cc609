"""`llmjax export`: a run's weights as a Hugging Face checkpoint."""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
import tyro

from llmjax.checkpoint.checkpoints import Checkpoints, like, named
from llmjax.checkpoint.manifest import sync
from llmjax.commands.generate import choose_step
from llmjax.commands.imports import laid_out
from llmjax.commands.origin import origin_of
from llmjax.data import chat
from llmjax.data.tokenizer import end_of_text, load
from llmjax.errors import DONE, IO, Refused
from llmjax.interop import configs, safetensors, weights
from llmjax.interop import folder as interop
from llmjax.interop.configs import Family, Json
from llmjax.interop.safetensors import Entry
from llmjax.interop.weights import Weight
from llmjax.run import Run, read
from llmjax.rundir import find
from llmjax.train.between import BASE
from llmjax.train.display import Display, memory
from llmjax.train.program import Program
from llmjax.train.resume import read_weights

DTYPES = dict(float32=np.dtype(np.float32), bfloat16=np.dtype(ml_dtypes.bfloat16))


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes a run's weights, config and tokenizer as a Hugging Face checkpoint, and reads them back."""

    run: tyro.conf.Positional[str]
    "Name of a run, or the path of its directory."
    out: tyro.conf.Positional[Path]
    "Folder to make."
    dtype: Literal["imported", "float32", "bfloat16"] = "imported"
    "Type of the tensors: that of the imported checkpoint or, where none was, float32; or one of these."
    shard: float = 5.0
    "Largest file in GB; what fits one file is one file."
    step: int = -1
    "Checkpoint to use; -1: the newest."
    mesh: str = "local"
    "Where the weights are laid out on their way: a name that `llmjax meshes` lists."
    runs: str = "runs"
    "Folder that holds run directories."


def export(asked: Export) -> int:
    """Writes the folder, which has its name once all of it is written and read back; returns an exit code.

    Raises:
      Refused: the run has no form at Hugging Face, or the folder cannot be written.
    """
    home = find(asked.run, asked.runs)
    run = read(home / "run.json")
    family = interop.family_of(run.model)
    origin = origin_of(run, home)
    config = config_of(run, family, origin, asked.dtype)
    kind, scratch = config.get("torch_dtype", config.get("dtype")), room(asked)
    program, display = laid_out(run, asked.mesh, "fsdp"), Display()
    try:
        with (
            program.context(),
            Checkpoints(home / "checkpoints") as checkpoints,
            display.waiting(f"writing {asked.out}"),
        ):
            step = choose_step(checkpoints, asked.step, home)
            wanted = named(like(program.abstract_model(), program.mesh))
            parts = family.weights(run.model)
            places = tensors(scratch, parts, wanted, DTYPES[kind], asked.shard)
            value = values(program, checkpoints, step, wanted)
            for weight in parts:  # one at a time
                write(weight, value(weight.ours), places)
        texts(scratch, home, origin, config)
        interop.read(scratch)  # what we write, we can read
        synced(scratch)
        scratch.rename(asked.out)
    except OSError as error:
        raise Refused(f"{asked.out} cannot be written ({error.strerror}): make room, or choose another.", IO) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    size = sum(path.stat().st_size for path in asked.out.iterdir())
    display.say(
        f"Exported step {step:,} of {home} to {asked.out}: {family.architecture}, {kind}, "
        f"{len(places):,} tensors, {memory(size)}, read back and found the same."
    )
    if getattr(run.model, "ahead", 0):
        display.say("The layers that predict further tokens are left out, as transformers has no place for them.")
    return DONE


def values(program: Program, checkpoints: Checkpoints, step: int, wanted: dict[str, Any]) -> Callable[[str], jax.Array]:
    """What reads a parameter of a checkpoint by name; of one that holds adapters, from the merged model."""
    if BASE in checkpoints.facts(step):
        return named(read_weights(program, checkpoints, step)).__getitem__
    return lambda name: checkpoints.restore(step, {f"model.{name}": wanted[name]})[f"model.{name}"]


def room(asked: Export) -> Path:
    """The folder that is written to: beside the one that is asked for, which is not there or empty."""
    out = asked.out.absolute()
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise Refused(f"{asked.out} is there already: choose another folder, or delete it.", IO)
        scratch = out.parent / f".{out.name}.{os.getpid()}"
        scratch.mkdir(parents=True)
    except OSError as error:
        raise Refused(f"{asked.out} cannot be made ({error.strerror}): choose another folder.", IO) from error
    return scratch


def config_of(run: Run, family: Family, origin: Path | None, dtype: str) -> Json:
    """config.json: the one that was imported, where it still says what the model is."""
    known = json.loads((origin / interop.CONFIG).read_text()) if origin else {}
    before = known.get("torch_dtype", known.get("dtype", "float32"))
    kept = before if before in DTYPES else "float32"
    config = configs.write(family, run.model, kept if dtype == "imported" else dtype)
    if known and configs.read(interop.known(), known)[1] == run.model:
        said = [name for name in ("dtype", "torch_dtype") if name in known] or ["torch_dtype"]
        return known | dict.fromkeys(said, config["torch_dtype"])
    return config | {name: known[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in known}


def tensors(
    folder: Path, parts: list[Weight], wanted: dict[str, Any], dtype: np.dtype, shard: float
) -> dict[str, Entry]:
    """Files with room for every tensor, in one file or several and an index."""
    arrays = {}
    for weight in parts:
        kind, shape = np.dtype(np.float32) if weight.float32 else dtype, wanted[weight.ours].shape
        arrays |= {theirs: (kind, weight.shape(shape)) for _, theirs in weight.names(shape)}
    if not shard > 0:
        raise Refused(f"shard is {shard}: give the largest size of a file in GB, such as 5.")
    files = list(_split(arrays, int(shard * 1e9)))
    places, index = {}, {}
    for number, names_ in enumerate(files, 1):
        file = interop.SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        places |= safetensors.create(folder / file, {name: arrays[name] for name in names_})
        index |= dict.fromkeys(names_, file)
    if len(files) > 1:
        size = sum(entry.map().nbytes for entry in places.values())
        said = dict(metadata=dict(total_size=size), weight_map=dict(sorted(index.items())))
        (folder / interop.INDEX).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return places


def _split(arrays: dict[str, tuple[np.dtype, tuple[int, ...]]], most: int) -> Iterator[list[str]]:
    now, size = [], 0
    for name, (dtype, shape) in arrays.items():
        more = math.prod(shape) * dtype.itemsize
        if now and size + more > most:
            yield now
            now, size = [], 0
        now.append(name)
        size += more
    yield now


def write(weight: Weight, value: jax.Array, places: dict[str, Entry]) -> None:
    """Writes a parameter and reads it back."""
    value = value.astype(np.float32)  # bfloat16 too would hide what is lost of a float32 file
    weights.store(weight, value, places)
    back, places_ = weights.load(weight, value, places), [shard.index for shard in value.addressable_shards]
    kind = next(places[name] for _, name in weight.names(value.shape)).dtype
    for index, ours, theirs in zip(places_, value.addressable_shards, back.addressable_shards, strict=True):
        written = np.asarray(ours.data).astype(kind).astype(np.float32)
        if written.tobytes() != np.asarray(theirs.data).tobytes():
            raise Refused(f"{weight.ours} at {index} does not read back as it was written: look at this disk.", IO)


def texts(folder: Path, home: Path, origin: Path | None, config: Json) -> None:
    """config.json, and the tokenizer's and generation's files: those that were imported, else what is known of them."""
    for name in interop.TEXTS:
        if origin and (path := interop.inside(origin, name)).is_file():
            shutil.copyfile(path, folder / name)
    tokenizer = home / "tokenizer.json"
    if not origin and tokenizer.is_file():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        end = end_of_text(found := load(tokenizer))
        config |= dict(bos_token_id=end, eos_token_id=end)
        said = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=found.id_to_token(end))
        (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=2) + "\n")
        said = dict(bos_token_id=end, eos_token_id=end)
        (folder / "generation_config.json").write_text(json.dumps(said, indent=2) + "\n")
    if (template := home / chat.ALONE).is_file() and not (folder / chat.ALONE).is_file():
        shutil.copyfile(template, folder / chat.ALONE)
    (folder / interop.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def synced(folder: Path) -> None:
    """Brings all of a folder to the disk."""

    def file(path: Path) -> None:
        with open(path, "rb+") as opened:
            os.fsync(opened.fileno())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(file, folder.iterdir()))
    sync(folder)
