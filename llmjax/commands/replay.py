"""`llmjax replay`: takes a step of a run again, from the checkpoint before it, and looks where it goes wrong."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llmjax import mesh as meshes
from llmjax import processes as system
from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.commands.train import cache_compiled_programs, open_data
from llmjax.data.batches import place
from llmjax.errors import DATA, DONE, UNEQUAL, Refused
from llmjax.processes import Processes
from llmjax.run import Run
from llmjax.train import blackbox, diloco
from llmjax.train.display import Display
from llmjax.train.finite import first_not_finite
from llmjax.train.loop import rows_of
from llmjax.train.program import Program, make, resolve
from llmjax.train.records import read
from llmjax.train.resume import begun, read_state, skipped
from llmjax.train.step import State


@dataclasses.dataclass(frozen=True)
class Options:
    """Which step."""

    step: int = 0
    "The step to take again, counted from 1."


def replay(run: Run, folder: Path, processes: Processes, asked: Options, display: Display | None = None) -> int:
    """Prints what the step gives; returns UNEQUAL where it is not what the records say. Nothing is written.

    Raises:
      Refused: there is no such step, or no checkpoint to begin from.
    """
    if not 1 <= asked.step <= run.steps:
        raise Refused(f"step is {asked.step}: give --step 1 to {run.steps}.")
    devices = system.start(run.mesh, processes)
    display = display or Display(quiet=jax.process_index() > 0)
    program = make(
        run, meshes.device_mesh(resolve(run, len(devices)), devices, run.mesh.slices), meshes.chip_of(run.mesh, devices)
    )
    dataset = open_data(program, display, jax.process_index() == 0)
    cache_compiled_programs(Path(run.runs))
    left_out = skipped(run, folder) - {asked.step}
    with program.context(), Checkpoints(folder / "checkpoints", say=display.say) as checkpoints:
        state, start = before(program, checkpoints, dataset, asked.step, display)
        state, equal = again(program, state, dataset, range(start, asked.step - 1), left_out, folder, display)
        return max(equal, last(program, state, dataset, asked.step, folder, display))


def before(program: Program, checkpoints: Checkpoints, dataset: Any, step: int, display: Display) -> tuple[State, int]:
    """The newest state from before a step, and the steps that it has done."""
    found = checkpoints.newest_verified(step - 1)
    if found is None:
        display.say("No checkpoint is as old as that: beginning at step 0.")
        return begun(program), 0
    facts = checkpoints.facts(found)
    if facts.get("data") not in (None, dataset.fingerprint):
        raise Refused(f"checkpoint {found} was trained on other data than this: bring the old data back.", DATA)
    state = read_state(program, checkpoints, found)
    display.say(f"Beginning at checkpoint {found}.")
    return state, found


def again(
    program: Program, state: State, dataset: Any, steps: range, left_out: set[int], folder: Path, display: Display
) -> tuple[State, int]:
    """The state after these steps, counted from 0; says which of them gave other numbers than the records hold."""
    recorded = {line["step"]: line for line in read(folder / "metrics.jsonl") if "loss" in line}
    differ = []
    for step in steps:
        if step + 1 in left_out:
            state = program.pass_over(state)
            continue
        state, metrics = program.step(state, batch_of(program, dataset, step))
        line = recorded.get(step + 1)
        if line and any(diloco.mean(metrics, name) != line[name] for name in ("loss", "grad_norm")):
            differ.append(step + 1)
    if differ:
        display.say(
            f"Step {differ[0]} gave other numbers than the records hold ({len(differ)} of {len(steps)} do): another "
            "mesh or version computes here, or a device computed wrongly then."
        )
    elif len(steps):
        display.say(f"Steps {steps[0] + 1} to {steps[-1] + 1} gave the numbers of the records, bit for bit.")
    return state, UNEQUAL if differ else DONE


def last(program: Program, state: State, dataset: Any, step: int, folder: Path, display: Display) -> int:
    """Takes the step itself, and says what it gives and where it stops being finite."""
    run, rows = program.run, rows_of(program.run, dataset, step - 1)
    batch = batch_of(program, dataset, step - 1)
    _, metrics = program.step(jax.tree.map(jnp.copy, state), batch)
    loss, grad_norm = (diloco.mean(metrics, name) for name in ("loss", "grad_norm"))
    facts = blackbox.contents(program, state, step, batch, rows, loss, grad_norm)
    display.say(f"Step {step}: loss {loss}, gradient norm {grad_norm}, on rows {', '.join(map(str, rows.tolist()))}.")
    norms = facts.get("gradient_norms", {})
    display.table(["gradient of", "norm"], [[name, f"{float(norm):.6g}"] for name, norm in norms.items()])
    kept, code = folder / "faults" / f"{step}.json", DONE
    if kept.is_file():
        then = json.loads(kept.read_text(encoding="utf-8"))
        same = [then.get(name) == facts[name] for name in ("state", "batch")]
        display.say(f"Its state and its batch are {'those' if all(same) else 'not those'} of faults/{step}.json.")
        code = DONE if all(same) else UNEQUAL
    where = first_not_finite(program.differentiated(state), batch, program.loss(state)) if not run.local.every else None
    display.say(f"First not finite: {where}." if where else "All of it is finite.")
    return code


def batch_of(program: Program, dataset: Any, step: int) -> dict[str, jax.Array]:
    """The batch of a step, counted from 0."""
    rows = rows_of(program.run, dataset, step)
    return place(dataset, "train", rows, accumulate=program.accumulate, sharding=program.batch_sharding())
