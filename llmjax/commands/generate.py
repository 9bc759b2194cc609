"""`llmjax generate`: text from any checkpoint of any run."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from llmjax import mesh as meshes
from llmjax import names, processes
from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.data.tokenizer import end_of_text, load
from llmjax.errors import DATA, DONE, Refused
from llmjax.evaluate.generate import Sampling, check, complete
from llmjax.mesh import Axes
from llmjax.run import read
from llmjax.rundir import find
from llmjax.train.display import Display
from llmjax.train.program import make, resolve
from llmjax.train.resume import read_weights


@dataclasses.dataclass(frozen=True)
class Generate:
    """Completes prompts with a trained run."""

    run: tyro.conf.Positional[str]
    "Name of a run, or the path of its directory."
    prompt: tuple[str, ...] = ("def ",)
    "Texts to complete."
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
    folder = find(asked.run, asked.runs)
    run = read(folder / "run.json")
    if not (folder / "tokenizer.json").is_file():
        raise Refused(f"{folder} has no tokenizer.json: only runs trained on text can complete text.", DATA)
    tokenizer = load(folder / "tokenizer.json")
    mesh = names.load("meshes", asked.mesh, "cluster")
    run = dataclasses.replace(run, mesh=mesh, axes=Axes(), accumulate=1, attention="reference")
    devices = processes.start(run.mesh, processes.Processes())
    mesh = meshes.device_mesh(resolve(run, len(devices)), devices, run.mesh.slices)
    program = make(run, mesh, meshes.chip_of(run.mesh, devices))
    with program.context(), Checkpoints(folder / "checkpoints") as checkpoints:
        step = choose_step(checkpoints, asked.step, folder)
        model = read_weights(program, checkpoints, step)
        prompts = [tokenizer.encode(text).ids for text in asked.prompt]
        positions = min(run.sequence, run.model.positions)
        new = complete(model, prompts, asked.sampling, positions=positions, end=end_of_text(tokenizer))
    display = Display()
    for prompt, tokens in zip(asked.prompt, new, strict=True):
        display.sample(prompt, tokenizer.decode(tokens))
    return DONE


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
