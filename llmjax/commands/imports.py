"""`llmjax import`: a run that begins with the weights of a Hugging Face checkpoint."""

import dataclasses
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from llmjax import mesh as meshes
from llmjax import names, processes
from llmjax.checkpoint.checkpoints import Checkpoints, like
from llmjax.commands.origin import KEPT
from llmjax.commands.train import acceptable, claim
from llmjax.data.dataset import Text
from llmjax.data.tokenizer import TokenizerFile, load, vocabulary
from llmjax.errors import DATA, DONE, IO, Refused
from llmjax.interop import folder as interop
from llmjax.layout import Pipeline, preset
from llmjax.mesh import Axes
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import Cosine
from llmjax.run import DiLoCo, LoRA, Run, read
from llmjax.rundir import find
from llmjax.train.between import decisive
from llmjax.train.display import Display, count
from llmjax.train.loss import NextToken
from llmjax.train.program import Program, make, resolve
from llmjax.train.resume import WEIGHTS
from llmjax.train.routed import RoutedNextToken
from llmjax.train.step import State


@dataclasses.dataclass(frozen=True)
class Import:
    """Makes a run whose checkpoint of step 0 is a Hugging Face checkpoint's weights; nothing is downloaded."""

    folder: tyro.conf.Positional[Path]
    "Folder with config.json, safetensors and, for text, tokenizer.json."
    name: str = ""
    "Name of the run; the folder's if empty."
    runs: str = "runs"
    "Folder that holds run directories."
    mesh: str = "local"
    "Where the weights are laid out on their way: a name that `llmjax meshes` lists."
    layout: str = "fsdp"
    "How: each device reads the slices that it holds. A run may use any other afterwards."


def bring(asked: Import) -> int:
    """Reads the checkpoint and writes the run directory; returns an exit code.

    Raises:
      Refused: the checkpoint is not whole or not honoured, or the directory is taken.
    """
    found = interop.read(asked.folder)
    run = run_of(asked, found)
    acceptable(run)
    home = run.folder()
    if home.exists():
        raise Refused(f"{home} is there already: choose another --name, or delete it to import again.", IO)
    texts = found.texts()
    if "tokenizer.json" in texts:
        fits(texts["tokenizer.json"], run)
    program, display = laid_out(run, asked.mesh, asked.layout), Display()
    with program.context(), display.waiting(f"reading {found.folder} and writing {home}"):
        model = found.load(like(program.abstract_model(), program.mesh))
        Path(run.runs).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{run.name}.", dir=run.runs) as scratch:
            write(run, State(jnp.int32(0), model, ()), Path(scratch) / run.name, texts, found)
            (Path(scratch) / run.name).rename(home)
    say(run, found, sum(x.size for x in jax.tree.leaves(model)), display)
    return DONE


def laid_out(run: Run, mesh: str, layout: str) -> Program:
    """The run's program on the devices here, to hold its weights and not to train."""
    run = dataclasses.replace(
        run, mesh=names.load("meshes", mesh, "cluster"), axes=Axes(), layout=preset(layout), accumulate=1,
        attention="reference", local=DiLoCo(every=0), pipeline=Pipeline(), lora=LoRA(),
    )  # fmt: skip
    devices = processes.start(run.mesh, processes.Processes())
    run = dataclasses.replace(run, batch=len(devices))
    on_devices = meshes.device_mesh(resolve(run, len(devices)), devices, run.mesh.slices)
    return make(run, on_devices, meshes.chip_of(run.mesh, devices))


def run_of(asked: Import, found: interop.Checkpoint) -> Run:
    """The run that the checkpoint is the beginning of: to be copied, changed and trained."""
    name = asked.name or asked.folder.resolve().name
    home = Path(asked.runs) / name
    return Run(
        model=found.model,
        data=Text(path="data/corpus", tokenizer=TokenizerFile(str(home / "tokenizer.json"))),
        optimizer=AdamW(lr=1e-5, schedule=Cosine(warmup=20)),
        loss=RoutedNextToken() if hasattr(found.model, "experts") else NextToken(),
        mesh=names.load("meshes", asked.mesh, "cluster"),
        layout=preset(asked.layout),
        sequence=min(1024, found.model.positions),
        weights=str(home),
        name=name,
        runs=asked.runs,
    )


def begin_from(run: Run, source: str, runs: str) -> Run:
    """The run with the model, tokenizer, template and weights of another run, or of a Hugging Face checkpoint.

    Raises:
      Refused: there is neither, or the checkpoint is not honoured.
    """
    if (Path(source) / interop.CONFIG).is_file() and not (Path(source) / "run.json").is_file():
        home, model = Path(source), interop.read(Path(source)).model
    else:
        home = find(source, runs)
        model = read(home / "run.json").model
    tokenizer = home / "tokenizer.json"
    data = run.data
    if hasattr(data, "tokenizer") and tokenizer.is_file():
        data = dataclasses.replace(data, tokenizer=TokenizerFile(str(tokenizer)))
    if hasattr(data, "template") and not data.template:
        data = dataclasses.replace(data, template=str(home / KEPT if (home / KEPT).is_dir() else home))
    return dataclasses.replace(
        run, model=model, data=data, weights=str(home), sequence=min(run.sequence, model.positions)
    )


def fits(path: Path, run: Run) -> None:
    """Refuses a tokenizer with more tokens than the model has."""
    if (tokens := vocabulary(load(path))) > run.model.vocab:
        raise Refused(
            f"{path} has {tokens:,} tokens, more than the {run.model.vocab:,} rows of the embedding: give the "
            f"tokenizer that belongs to it.",
            DATA,
        )


def write(run: Run, state: State, home: Path, texts: dict[str, Path], found: interop.Checkpoint) -> None:
    """The run directory: the checkpoint, the small files as they were, and run.json."""
    (home / KEPT).mkdir(parents=True)
    for name, path in texts.items() | {(interop.CONFIG, found.folder / interop.CONFIG)}:
        shutil.copyfile(path, home / KEPT / name)
    if "tokenizer.json" in texts:
        shutil.copyfile(texts["tokenizer.json"], home / "tokenizer.json")
    with Checkpoints(home / "checkpoints") as checkpoints:
        checkpoints.save(0, state, {"step": 0, "run": decisive(run), WEIGHTS: True})
        checkpoints.wait()
    claim(home, run)


def say(run: Run, found: interop.Checkpoint, parameters: int, display: Display) -> None:
    display.say(f"Imported {found.folder}: {type(run.model).__name__}, {count(parameters)} parameters, {run.folder()}.")
    for note in found.notes:
        display.say(note)
    if not (run.folder() / "tokenizer.json").is_file():
        display.say("There is no tokenizer.json: give one with --data.tokenizer.path.")
    itself = run.folder()
    display.say(
        f'Next:\n  llmjax generate {itself} --prompt "The"\n'
        f"  llmjax train {itself / 'run.json'} --name {run.name}_tuned --data.path FOLDER\n"
        f"  llmjax train EXPERIMENT --from {itself}"
    )
