"""Where a run goes on: the newest checkpoint that verifies, and the records cut back to it."""

import dataclasses
from pathlib import Path

import jax

from llmjax.checkpoint.checkpoints import Checkpoints, like
from llmjax.errors import DATA, Refused
from llmjax.run import Run, differences, fingerprint
from llmjax.train.ledger import Ledger
from llmjax.train.loop import decisive
from llmjax.train.program import Program
from llmjax.train.records import read
from llmjax.train.step import State, watch

# Fields that came later than checkpoints that hold a run's fingerprint alone, with what was done before.
LATER = dict(size=0, moments="float32", parameters="float32")


def restore(program: Program, dataset, ledger: Ledger) -> tuple[State, int]:
    """The state to go on from, and the number of steps it has done."""
    step = ledger.checkpoints.newest_verified()
    if step is None:
        if ledger.records:
            if read(program.run.folder() / "metrics.jsonl"):
                ledger.display.say(f"{program.run.folder()} has no checkpoint yet: starting again from step 0.")
            redo(ledger, 0)
        return program.init(jax.random.key(program.run.seed)), 0
    facts = ledger.checkpoints.facts(step)
    if facts.get("data") not in (None, dataset.fingerprint):
        if not program.run.accept_data:
            raise Refused(
                f"checkpoint {step} of {program.run.folder()} was trained on other data than this (the corpus or its "
                f"tokenizer changed): bring the old data back, start afresh with another --name, or go on with this "
                f"data and --accept-data.",
                DATA,
            )
        ledger.event("data_replaced", step=step, before=facts["data"], after=dataset.fingerprint)
    fields = ", ".join(differences(facts["run"], decisive(program.run))) if "run" in facts else ""
    known = None, fingerprint(program.run), fingerprint(program.run, LATER)
    if fields or ("run" not in facts and facts.get("config") not in known):
        raise Refused(
            f"checkpoint {step} of {program.run.folder()} was written by a run of another config than its run.json "
            f"says{f', which differs in {fields}' if fields else ''}: continue it where it was written, or start "
            f"afresh with another --name.",
            DATA,
        )
    before = facts.get("mesh")
    workers, data = before.get("data") if isinstance(before, dict) else None, program.mesh.shape["data"]
    if program.run.local.every and workers not in (None, data):
        raise Refused(
            f"axes.data is {data}, but checkpoint {step} of {program.run.folder()} has {workers} workers of local SGD: "
            f"continue with --axes.data {workers}, or start afresh with another --name."
        )
    state = read_state(program, ledger.checkpoints, step)
    if ledger.records:
        redo(ledger, step, program.run.steps)
    ledger.display.say(f"Continuing {program.run.folder()} from step {step:,}.")
    return state, step


def read_state(program: Program, checkpoints: Checkpoints, step: int) -> State:
    """The state of a checkpoint on the program's mesh; one that an older version wrote has seen nothing yet."""
    wanted = program.abstract_state()
    if not checkpoints.facts(step).get("watched"):
        wanted = dataclasses.replace(wanted, watch=None)
    state = checkpoints.restore(step, like(wanted, program.mesh))
    if state.watch is None and not program.run.local.every:
        state = dataclasses.replace(state, watch=jax.jit(watch)())
    return state


def redo(ledger: Ledger, step: int, end: int | None = None) -> None:
    """Takes back what the records say of the steps that will be done again."""
    dropped = [line for line in ledger.records.rewind(step, end) if "step_ms" in line]
    if dropped:
        timed = [line for line in dropped if "compiled" not in line]  # the others count as compiling
        seconds = sum(line["step_ms"] - min(line["data_wait_ms"], line["step_ms"]) for line in timed) / 1e3
        until = max(line.get("elapsed", 0) for line in dropped)  # in the clock of the process that did them
        ledger.event("redo", steps=len(dropped), seconds=seconds, until=until)


def skipped(run: Run, folder: Path | None) -> set[int]:
    """The steps, counted from 1, whose batches are left out: the run's own and those that a folder's events tell."""
    found = set(run.guard.skip)
    for event in read(folder / "events.jsonl") if folder else ():
        if event["kind"] == "skip":
            found.add(event["step"])
        if event["kind"] == "rewind":
            found.update(range(event["step"], event["step"] + event["window"]))
    return found
