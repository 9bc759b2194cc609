"""`llmjax show`: what an experiment comes to, value by value, and how large it is."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.text import Text

from llmjax import mesh as meshes
from llmjax import processes as system
from llmjax.commands import provenance
from llmjax.commands.provenance import COMMAND, DEFAULT, Value
from llmjax.errors import DONE, IO, Refused
from llmjax.plan.budget import within
from llmjax.processes import Processes
from llmjax.run import Run, to_json
from llmjax.train.display import Display, count, memory
from llmjax.train.program import Program, bytes_per_device, make, resolve

WIDEST = 44  # characters of a value in the table


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the result goes, besides the terminal."""

    json: str = ""
    "File to write the same to."


def show(
    word: str, before: Run, arguments: list[str], run: Run, processes: Processes, options: Options,
    display: Display | None = None,
) -> int:  # fmt: skip
    """Prints the run that an experiment `word` and the command line come to; returns an exit code.

    Devices are looked for only where the mesh leaves them open, and nothing is read, built or compiled.

    Raises:
      Refused: the run's shapes cannot be cut over its mesh.
    """
    check_file(options.json)
    display, program = display or Display(), on_mesh(run, processes)
    told = provenance.values(before, run, arguments, program, word)
    facts = provenance.facts(program)
    table(display, f"llmjax show {run.name}", told)
    display.say()
    display.facts("Size", sizes(program, facts))
    display.say(f"\nNext:\n  llmjax train {' '.join([word, *arguments])}\n  llmjax draw {' '.join([word, *arguments])}")
    if options.json:
        fields = [dataclasses.asdict(value) for value in told]
        text = json.dumps(dict(run=to_json(run), fields=fields, **facts), indent=1)
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    return DONE


def check_file(path: str) -> None:
    """Refuses, before anything is done, a file that could not be written after it."""
    folder = Path(path).absolute().parent
    if path and (not folder.is_dir() or Path(path).is_dir()):
        wrong = f"{folder} is no folder" if not folder.is_dir() else "it is a folder"
        raise Refused(f"the file to write is {path}, and {wrong}: make it, or choose another file.", IO)


def on_mesh(run: Run, processes: Processes) -> Program:
    """The run's program on its mesh as a type, the mesh being what this machine has where the run leaves that open."""
    cluster = run.mesh
    if cluster.chips is None or cluster.chip is None:
        devices = system.start(cluster, processes)
        cluster = dataclasses.replace(cluster, chips=len(devices), chip=meshes.chip_of(cluster, devices))
    run = dataclasses.replace(run, mesh=cluster)
    axes = resolve(run, cluster.chips)
    if hasattr(run.model, "matrices"):
        run = within(run, axes, cluster.chip)
    return make(run, meshes.abstract_mesh(axes), cluster.chip)


def table(display: Display, title: str, told: list[Value]) -> None:
    """Fields, values and sources; what somebody chose stands out from what is the default."""
    cells = [(value.field, _short(provenance.text(value.value)), value.source) for value in told]
    first, second = (max(len(row[i]) for row in cells) for i in (0, 1))
    display.console.print(title, style="bold", markup=False)
    for field, value, source in cells:
        style = {DEFAULT: "dim", COMMAND: "bold"}.get(source, "")
        display.console.print(Text(f"  {field:<{first}}  {value:<{second}}  {source}", style=style))


def sizes(program: Program, facts: dict[str, Any]) -> dict[str, str]:
    """The model and the run in numbers."""
    state = program.abstract_state()
    held = (bytes_per_device(tree, program.mesh) for tree in ((state.model, state.frozen), state.opt))
    parameters, optimizer = map(memory, held)
    devices = f"on each of {program.mesh.size} devices" if program.mesh.size > 1 else "on one device"
    many = f"{count(facts['parameters'])} ({facts['parameters']:,})"
    at_rest = {"memory": f"parameters {parameters}, optimizer {optimizer} {devices}"}
    if "flops" not in facts:
        return {"parameters": many} | at_rest
    return {
        "parameters": f"{many}, {count(facts['active'])} multiply a token",
        "tokens": f"{facts['tokens']:,} = {program.run.steps:,} steps x {program.run.batch:,} rows x "
        f"{program.run.sequence:,}; {facts['tokens_per_parameter']:.3g} per parameter",
        "FLOPs": f"{facts['flops_per_token']:.4g} per token, training (causal; {facts['flops_per_token_full']:.4g} "
        f"with all of attention); {facts['flops']:.4g} in all",
    } | at_rest


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."
