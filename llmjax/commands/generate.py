"""`llmjax generate`: text from any checkpoint of any run."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from llmjax import mesh as meshes
from llmjax import names, processes
from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.commands.origin import origin_of
from llmjax.data import chat
from llmjax.data.tokenizer import load
from llmjax.errors import DATA, DONE, Refused
from llmjax.evaluate.conversation import Conversation
from llmjax.evaluate.generate import Sampling, check, complete, fits, ready, room
from llmjax.evaluate.streaming import before, pieces, until
from llmjax.mesh import Axes
from llmjax.models.cache import Parts
from llmjax.run import Run, read
from llmjax.rundir import find
from llmjax.train.display import Display
from llmjax.train.program import make, resolve
from llmjax.train.resume import read_weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Generate:
    """Completes prompts with a trained run."""

    run: tyro.conf.Positional[str]
    "Name of a run, or the path of its directory."
    prompt: tuple[str, ...] = ("def ",)
    "Texts to complete: one appears as it is made, several are made together."
    stop: tuple[str, ...] = ()
    "Strings before which a completion ends."
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()
    step: int = -1
    "Checkpoint to use; -1: the newest."
    mesh: str = "local"
    "Where to run: a name that `llmjax meshes` lists."
    runs: str = "runs"
    "Folder that holds run directories."


def generate(asked: Generate) -> int:
    """Prints the completions; returns an exit code."""
    check(asked.sampling)
    if not asked.prompt or not all(asked.stop):
        raise Refused("--prompt and --stop take texts that are not empty: give at least one prompt.")
    display, how = Display(), asked.sampling
    with loaded(asked.run, asked.runs, asked.step, asked.mesh) as (run, home, tokenizer, model):
        prompts = [tokenizer.encode(text).ids for text in asked.prompt]
        positions, ends = min(run.sequence, run.model.positions), ends_of(run, home, tokenizer)
        if len(prompts) == 1:
            fits(prompts, how, positions)
            talk = Conversation(model, room(len(prompts[0]) + how.tokens, positions))
            talk.read(prompts[0])
            display.sample_as_made(asked.prompt[0], until(pieces(talk.answer(how, ends), tokenizer.decode), asked.stop))
            return DONE
        new = complete(model, prompts, how, positions=positions, end=ends, stop=asked.stop, decode=tokenizer.decode)
    for prompt, tokens in zip(asked.prompt, new, strict=True):
        text = tokenizer.decode(tokens)
        cut = before(text, asked.stop)
        display.sample(prompt, text if cut is None else cut)
    return DONE


@contextlib.contextmanager
def loaded(name: str, runs: str, step: int, mesh: str) -> Iterator[tuple[Run, Path, "Tokenizer", Parts]]:
    """(run, its directory, its tokenizer, its model on a mesh to write with), in the context of its program.

    Raises:
      Refused: there is no such run, it has no tokenizer, or no such checkpoint.
    """
    home = find(name, runs)
    run = read(home / "run.json")
    if not (home / "tokenizer.json").is_file():
        raise Refused(f"{home} has no tokenizer.json: only runs trained on text can complete text.", DATA)
    tokenizer = load(home / "tokenizer.json")
    mesh = names.load("meshes", mesh, "cluster")
    run = dataclasses.replace(
        run, mesh=mesh, axes=Axes(), accumulate=1, attention="reference", unroll=getattr(run.model, "layers", 1)
    )
    devices = processes.start(run.mesh, processes.Processes())
    mesh = meshes.device_mesh(resolve(run, len(devices)), devices, run.mesh.slices)
    program = make(run, mesh, meshes.chip_of(run.mesh, devices))
    with program.context(), Checkpoints(home / "checkpoints") as checkpoints:
        yield run, home, tokenizer, ready(read_weights(program, checkpoints, choose_step(checkpoints, step, home)))


def ends_of(run: Run, home: Path, tokenizer: "Tokenizer") -> tuple[int, ...]:
    """The tokens at which a text of this run ends: those of the checkpoint that it came from, and the end of text."""
    return chat.ends(origin_of(run, home) or home, tokenizer)


def choose_step(checkpoints: Checkpoints, step: int, folder: Path) -> int:
    """The checkpoint asked for, or the newest; one that is what was written."""
    steps = checkpoints.steps()
    if not steps:
        raise Refused(f"{folder} has no checkpoint yet: train it first (llmjax train {folder.name}).", DATA)
    if step == -1:
        return checkpoints.newest_verified()
    if step not in steps:
        raise Refused(f"{folder} has no checkpoint of step {step}: choose one of {', '.join(map(str, steps))}.", DATA)
    if reason := checkpoints.verify(step):
        raise Refused(f"checkpoint {step} of {folder} is not what was written ({reason}): choose another --step.", DATA)
    return step
