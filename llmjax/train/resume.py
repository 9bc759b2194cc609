"""Where a run goes on: the newest checkpoint that verifies, and the records cut back to it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from llmjax import changes
from llmjax.checkpoint.checkpoints import Checkpoints, like
from llmjax.errors import DATA, Refused
from llmjax.interop import folder as interop
from llmjax.run import LoRA, Run, differences, fingerprint, from_json, to_json
from llmjax.run import read as read_run
from llmjax.train import adapters, digest
from llmjax.train.between import BASE, decisive, versions
from llmjax.train.ledger import Ledger
from llmjax.train.program import Program, stored, weights
from llmjax.train.records import read
from llmjax.train.step import State, watch

# Fields that came later than checkpoints that hold a run's fingerprint alone, with what was done before.
LATER = dict(size=0, moments="float32", parameters="float32", weights="", lora=to_json(LoRA()))
WEIGHTS = "weights_only"  # what the facts say of a checkpoint that training may begin with, and not go on from


def restore(program: Program, dataset, ledger: Ledger) -> tuple[State, int]:
    """The state to go on from, and the number of steps it has done."""
    step = ledger.checkpoints.newest_verified()
    if step is None:
        if ledger.records:
            if read(program.run.folder() / "metrics.jsonl"):
                ledger.display.say(f"{program.run.folder()} has no checkpoint yet: starting again from step 0.")
            redo(ledger, 0)
        return begun(program, ledger.display.say), 0
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
    found = changes.since(facts, to_json(program.run), dict(program.mesh.shape), versions(), dataset.fingerprint)
    for line in changes.sentences(found):
        ledger.display.say(line)
    return state, step


def begun(program: Program, say: Callable[[str], None] = print) -> State:
    """The state before step 1: fresh weights, or those that the run says.

    Raises:
      Refused: there are none, or they are of another model.
    """
    run = program.run
    if not run.weights:
        return program.init(jax.random.key(run.seed))
    model = weights_of(program, run.weights, say)
    say(f"Beginning with the weights of {run.weights}.")
    return program.begin(model)


def weights_of(program: Program, weights: str, say: Callable[[str], None] = print) -> Any:
    """The model in a run's newest checkpoint, or in a Hugging Face folder, on the program's mesh.

    Raises:
      Refused: there is none, or it is of another model.
    """
    source, run = Path(weights), program.run
    if not (source / "run.json").is_file():
        found = interop.read(source)
        _same_family(run, found.model)
        for note in found.notes:
            say(note)
        return found.load(like(program.abstract_model(), program.mesh))
    _same_family(run, read_run(source / "run.json").model)
    with Checkpoints(source / "checkpoints", say=say) as checkpoints:
        step = checkpoints.newest_verified()
        if step is None:
            raise Refused(f"weights is {source}, which has no checkpoint yet: train it first.", DATA)
        return read_weights(program, checkpoints, step)


def _same_family(run: Run, other: Any) -> None:
    """Refuses weights that another family would read otherwise; that their shapes fit is seen where they are read."""
    if type(other) is not type(run.model):
        raise Refused(
            f"weights is {run.weights}, of a {type(other).__name__}, and model is a {type(run.model).__name__}: "
            f"give --from {run.weights}, which takes its model too."
        )


def read_weights(program: Program, checkpoints: Checkpoints, step: int) -> Any:
    """The model of a checkpoint on the program's mesh, and nothing else of it; its adapters, if any, are merged.

    Raises:
      Refused: it holds another model, or the weights that its adapters are for are no longer what they were.
    """
    how = _adapters(checkpoints.facts(step))
    if not how.rank:
        wanted = like(program.abstract_model(), program.mesh)
        return checkpoints.restore(step, State((), wanted, ())).model
    base = _base(program, checkpoints, step)
    with program.context():
        wanted = jax.eval_shape(lambda model: adapters.fresh(model, how, jax.random.key(0)), base)
        pairs = checkpoints.restore(step, State((), like(wanted, program.mesh), ())).model
        return jax.jit(lambda model, pairs: adapters.merged(model, pairs, how), donate_argnums=0)(base, pairs)


def _adapters(facts: dict[str, Any]) -> LoRA:
    """The adapters of the run that wrote a checkpoint with these facts."""
    return from_json(facts.get("run", {}).get("lora", to_json(LoRA())))


def _base(program: Program, checkpoints: Checkpoints, step: int) -> Any:
    """The frozen weights that a checkpoint was trained beside."""
    facts = checkpoints.facts(step)
    written = facts["run"]
    run = dataclasses.replace(
        program.run, weights=written["weights"], parameters=written["parameters"], seed=written["seed"]
    )
    if run.weights:
        model = jax.jit(lambda model: stored(run, model))(weights_of(program, run.weights))
    else:
        model = jax.jit(weights(run))(jax.random.key(run.seed))
    return _unchanged(model, facts, checkpoints, step)


def _unchanged(model: Any, facts: dict[str, Any], checkpoints: Checkpoints, step: int) -> Any:
    """The frozen weights of a checkpoint with these facts, if they are what they were.

    Raises:
      Refused: they are others.
    """
    known = facts[BASE]
    if digest.one(model) != known["digest"]:
        where = known["path"] or "the seed"
        raise Refused(
            f"the weights of {where} are not those that checkpoint {step} of {checkpoints.folder.parent} was trained "
            f"beside: bring them back as they were, or start afresh with another --name.",
            DATA,
        )
    return model


def read_state(program: Program, checkpoints: Checkpoints, step: int) -> State:
    """The state of a checkpoint on the program's mesh; one that an older version wrote has seen nothing yet."""
    wanted, facts = program.abstract_state(), checkpoints.facts(step)
    if facts.get(WEIGHTS):
        return program.begin(read_weights(program, checkpoints, step))
    if not facts.get("watched"):
        wanted = dataclasses.replace(wanted, watch=None)
    frozen = None
    if wanted.frozen is not None:
        frozen = _unchanged(begun(program, lambda _: None).frozen, facts, checkpoints, step)
        wanted = dataclasses.replace(wanted, frozen=None)
    state = dataclasses.replace(checkpoints.restore(step, like(wanted, program.mesh)), frozen=frozen)
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
