"""From a Run to a trained model: set up, resume, train, evaluate, complete the prompts, sum up."""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import platform
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

import llmjax
from llmjax import mesh as meshes
from llmjax import names, reading, redact
from llmjax import processes as system
from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.checkpoint.retention import Retention
from llmjax.data import chat, mixture
from llmjax.data.dataset import check_rows
from llmjax.data.stored import check_epochs
from llmjax.errors import DATA, DONE, IO, NON_FINITE, PREEMPTED, USAGE, Refused
from llmjax.evaluate.generate import Sampling, complete
from llmjax.mesh import Axes
from llmjax.notice import Notice
from llmjax.plan import kept
from llmjax.plan.budget import within
from llmjax.processes import Processes, Supervised
from llmjax.report import goodput
from llmjax.run import FREE, Run, differences, to_json
from llmjax.rundir import own
from llmjax.tracking import Tracker
from llmjax.train import between, loop
from llmjax.train.between import decisive
from llmjax.train.display import Display, count, duration, memory
from llmjax.train.ledger import Heartbeat, Ledger, owned
from llmjax.train.program import Program, bytes_per_device, fallen_back, make, resolve
from llmjax.train.records import Records, read
from llmjax.train.resume import restore, skipped
from llmjax.train.spent import Spent
from llmjax.train.step import State
from llmjax.train.vitals import Vitals, forget


def train(
    run: Run,
    processes: Processes = Processes(),
    supervised: Supervised = Supervised(),
    notice: Notice | None = None,
    display: Display | None = None,
) -> int:
    """Trains, or continues, the run in its directory; returns an exit code (see llmjax.errors).

    Without a `notice`, signals do what they always do.

    Raises:
      Refused: the run, its data or its directory cannot be used as asked.
    """
    spent = Spent()
    acceptable(run)
    run = fallen_back(run) if supervised.fallback else run
    heartbeat = Heartbeat(supervised.heartbeat, run.folder(), fallback=supervised.fallback)
    heartbeat(0, "start")
    devices = system.start(run.mesh, processes)
    stop = stopping(notice)
    system.agreement(decisive(run) | dict(code=code(), jax=jax.__version__))
    display = display or Display(quiet=jax.process_index() > 0)
    axes, chip = resolve(run, len(devices)), meshes.chip_of(run.mesh, devices)
    mesh = meshes.device_mesh(axes, devices, run.mesh.slices)
    run = within(run, axes, chip)
    program = make(run, mesh, chip)
    folder = directory(run)
    if finished(folder, run.steps):
        display.say(f"Run {run.name} is finished: {run.steps:,} steps, {folder}.")
        display.say(next_steps(run))
        return DONE
    dataset = open_data(program, display, jax.process_index() == 0)
    tasks = questions(program, dataset)
    with recording(program, folder, display, spent, heartbeat) as ledger:
        spent.mark("start")
        with display.waiting("making or restoring the state"):
            state, start = restore(program, dataset, ledger)
        spent.mark("restore")
        if ledger.records:
            write_environment(folder, program, devices, state, dataset.fingerprint)
            if dataset.tokenizer is not None:
                (folder / "tokenizer.json").write_text(dataset.tokenizer.to_str(pretty=True), encoding="utf-8")
            if template := getattr(dataset, "template", None):
                chat.write(folder, template)
        header(program, state, dataset, start, display)
        spent.mark("start")
        if notice:
            notice.save_first()
        ledger.event(
            "start", step=start, devices=len(devices), seconds=spent.elapsed(),
            process_began=time.time() - spent.elapsed(),
        )  # fmt: skip
        ledger.account(now=True)
        sample = functools.partial(samples, program, dataset, ledger)
        return to_the_end(program, state, start, dataset, ledger, between.Around(stop, tasks, sample))


@contextlib.contextmanager
def recording(program: Program, folder: Path, display: Display, spent: Spent, heartbeat: Heartbeat) -> Iterator[Ledger]:
    """The run directory, taken for this run, with what is written to it; all processes come here."""
    run = program.run
    with contextlib.ExitStack() as stack:
        first = jax.process_index() == 0
        if first:
            stack.enter_context(owned(folder, display.say))
            claim(folder, run)
            forget(folder)
        system.barrier("run directory")
        cache_compiled_programs(Path(run.runs))
        stack.enter_context(program.context())
        retention = Retention(run.keep, run.keep_every, run.keep_best)
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", retention, display.say))
        records = stack.enter_context(Records(folder, run.trackers, to_json(run), display.say)) if first else None
        vitals = Vitals(folder)
        vitals(0, "start")

        def alive(step: int, phase: str) -> None:
            heartbeat(step, phase)
            vitals(step, phase)

        yield Ledger(display, checkpoints, records, spent, alive)


def to_the_end(program: Program, state: State, start: int, dataset, ledger: Ledger, around: between.Around) -> int:
    """Trains from step `start`, saves, and, unless it was asked to stop, evaluates and sums up; the exit code."""
    run, spent, display = program.run, ledger.spent, ledger.display
    state, done = steps(program, state, start, dataset, ledger, around)
    between.save(program, state, done, dataset, ledger, last=True)
    ledger.checkpoints.wait()
    spent.mark("save")
    facts = between.evaluate(program, state, dataset, ledger, done, stop=around.stop) if done == run.steps else None
    ended = facts is not None and (
        not around.tasks or between.ask(program.whole(state), ledger, done, around.tasks, stop=around.stop) is not None
    )
    if not ended:
        ledger.account(now=True)
        ledger.event("stop", step=done)
        ledger.heartbeat(done, "stop")
        display.say(f"Stopped and saved after step {done:,} of {run.steps:,}: run the same command to continue.")
        return PREEMPTED
    around.sample(state, done)
    ledger.heartbeat(done, "finish")
    spent.mark("evaluate")
    ledger.account(now=True)
    ledger.event("finish", step=done, seconds=spent.elapsed())
    summary(program, facts, dataset, run.folder(), display, spent.elapsed())
    return DONE


def acceptable(run: Run) -> None:
    """Refuses a name that leads out of the folder of runs, and a secret that run.json could not give back."""
    names.check_run(run.name)
    for tracker in run.trackers:
        if not isinstance(tracker, Tracker):
            raise Refused(f"trackers holds {tracker!r:.60}, which is none: name one of llmjax.trackers.")
        tracker.ready()
    if not run.runs.isprintable():
        raise Refused(f"runs is {run.runs!r}, which no folder can be called: give --runs a folder.")
    for field in redact.hidden(run):
        raise Refused(
            f"{field} has {redact.HIDDEN} in place of a secret, which is never written: give it with --{field}."
        )


def steps(program: Program, state: State, start: int, dataset, ledger: Ledger, around: between.Around):
    """The loop, from checkpoint to checkpoint where bad steps make the run go back."""
    guard, rewinds = program.run.guard, Counter()
    while True:
        left_out = system.share(sorted(skipped(program.run, program.run.folder() if ledger.records else None)))
        try:
            return loop.steps(program, state, start, dataset, ledger, around, frozenset(left_out))
        except loop.Rewind as bad:
            step = bad.step
        del state  # before another one takes its place
        ledger.checkpoints.wait()
        ledger.event("rewind", step=step, window=guard.window)
        ledger.display.say(f"step {step} was bad: going back, and leaving {guard.window} batch(es) out from there.")
        state, start = restore(program, dataset, ledger)
        ledger.spent.mark("restore")
        rewinds[start] += 1
        if rewinds[start] > guard.limit:
            raise Refused(
                f"step {step}: the run went back to step {start} {guard.limit} times and came to another bad step each "
                "time: lower --optimizer.lr, or raise --guard.limit or --guard.window.",
                NON_FINITE,
            )


def stopping(notice: Notice | None) -> Callable[[], bool]:
    """The question "shall we stop here?", answered alike on all processes, which all ask it at the same points.

    Several processes agree through JAX's preemption sync point, which has SIGTERM for itself from here on.
    """
    if jax.process_count() == 1:
        return lambda: notice is not None and notice.asked
    if notice:
        notice.forward(lambda: os.kill(os.getpid(), signal.SIGTERM))
    asked = itertools.count()
    agreed: list[bool] = []

    def stop() -> bool:
        if not agreed and multihost_utils.reached_preemption_sync_point(next(asked)):
            agreed.append(True)
        return bool(agreed)

    return stop


def code() -> str:
    """A digest of the library's own source, which is the same where the same numbers are computed."""
    digest = hashlib.sha256()
    for path in sorted(Path(llmjax.__path__[0]).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def directory(run: Run) -> Path:
    """The run directory: one that can be written, and is new or of this run. Nothing is written yet."""
    folder = run.folder()
    own(folder)
    try:
        home = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not home.is_dir() or not os.access(home, os.W_OK):
            why = f"{home} is {'write-protected' if home.is_dir() else 'a file'}"
            raise Refused(f"{folder} cannot be written ({why}): choose another folder, --runs.")
        if not (folder / "run.json").exists():
            return folder
        found = reading.parsed(reading.content(folder / "run.json", reading.RUN))
    except OSError as error:
        raise Refused(f"{folder} cannot be read ({error.strerror}): choose another folder, --runs.") from error
    except ValueError as error:
        raise Refused(
            f"{folder / 'run.json'} is not JSON ({error}): restore it or start afresh with another --name.", DATA
        ) from error
    changed = [d for d in differences(found, to_json(run)) if d.split(".")[0] not in FREE | {"is", "name"}]
    if changed:
        raise Refused(
            f"{folder} holds a run of another config, which differs in {', '.join(changed)}: "
            f"give the same values to continue it, or another --name to start afresh.",
            USAGE,
        )
    return folder


def claim(folder: Path, run: Run) -> None:
    """Makes the directory this run's; comes last of all that may be refused, so that a mistake leaves no trace."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / "run.json.new"
        scratch.write_text(json.dumps(to_json(run), indent=1) + "\n", encoding="utf-8")
        scratch.replace(folder / "run.json")
    except OSError as error:
        raise Refused(f"{folder} cannot be written ({error.strerror}): choose another folder, --runs.", IO) from error


def cache_compiled_programs(runs: Path) -> None:
    """Keeps compiled programs below the runs folder, so that the next start of the same run is quick."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str((runs / ".cache" / "compiled").absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def finished(folder: Path, steps: int) -> bool:
    """Whether an earlier start of this run came to its end."""
    return any(event["kind"] == "finish" and event["step"] == steps for event in read(folder / "events.jsonl"))


def open_data(program: Program, display: Display, first: bool):
    """The run's dataset; the first process builds what is missing, the others then find it."""
    run, cache = program.run, Path(program.run.runs) / ".cache" / "data"
    if not first:
        system.barrier("data")
    dataset = run.data.open(run.sequence, cache, display.say)
    if first:
        system.barrier("data")
    system.agreement(dict(data=dataset.fingerprint), DATA)
    check_data(run, dataset)
    if isinstance(dataset, mixture.MixtureDataset):
        display.table(["source", "asked", "sees", "rows", "epochs"], mixture.report(dataset, run.steps, run.batch))
    return dataset


def check_data(run: Run, dataset) -> None:
    """Refuses data that cannot fill a batch, would be gone through too often, or has tokens that the model lacks."""
    check_rows(dataset, run.batch)
    if isinstance(dataset, mixture.MixtureDataset):
        mixture.check(dataset, run.steps, run.batch)
    else:
        passes, most = run.steps * run.batch / dataset.size("train"), getattr(dataset, "epochs", 0.0)
        check_epochs(getattr(run.data, "path", "the corpus"), passes, most, run.steps, "lower")
    vocab = getattr(run.model, "vocab", None)
    if vocab and dataset.vocab and dataset.vocab > vocab:
        raise Refused(
            f"the tokenizer has {dataset.vocab} tokens, more than model.vocab {vocab}: raise --model.vocab, or train a "
            f"smaller tokenizer (--data.tokenizer.vocab).",
            DATA,
        )


def questions(program: Program, dataset) -> between.Tasks | None:
    """What asks the run's tasks, with their data at hand; None where it has none.

    Raises:
      Refused: there is no text to ask in, lm-eval is not installed, or a task cannot be had.
    """
    wanted = program.run.eval
    if not wanted.tasks:
        return None
    if dataset.tokenizer is None:
        raise Refused(f"eval.tasks is {', '.join(wanted.tasks)}, but the run's data is no text: leave the tasks out.")
    from llmjax.evaluate import harness

    return functools.partial(harness.ask, program, dataset.tokenizer, harness.load(wanted.tasks), wanted.tasks_limit)


def header(program: Program, state: State, dataset, start: int, display: Display) -> None:
    """What is about to happen."""
    run, model = program.run, program.run.model
    operands = program.compute.rounding or program.compute.operands
    parameters = program.size(state)
    axes = ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items() if size > 1) or "one device"
    tokens = run.steps * run.tokens
    train = dataset.size("train")
    said = dict(layers="{} layers", width="{} wide", heads="{} heads")
    shape = ", ".join(text.format(getattr(model, name)) for name, text in said.items() if hasattr(model, name))
    here = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    display.facts(
        f"llmjax train {run.name}",
        {
            "model": f"{type(model).__name__}, {count(parameters)} parameters{f' ({shape})' if shape else ''}",
            "data": f"{train:,} rows of {run.sequence}, {dataset.size('heldout'):,} held out",
            "run": f"{run.steps:,} steps x {run.batch} rows = {count(tokens)} tokens "
            f"({run.steps * run.batch / train:.2f} epochs)",
            "devices": f"{program.mesh.size} x {jax.devices()[0].device_kind}{here}",
            "mesh": f"{run.mesh.name}: {axes}; layout {run.layout.name}",
            "compute": f"{operands} products, accumulation {program.accumulate}, remat {run.remat}, "
            f"attention {program.compute.attention}" + (f" ({program.lacking})" if program.lacking else ""),
            **({"lora": lora(run, state)} if run.lora.rank else {}),
            **({"local": local(run, program.mesh.shape["data"])} if run.local.every else {}),
            "memory": f"per device: parameters {memory(bytes_per_device((state.model, state.frozen), program.mesh))}, "
            f"optimizer {memory(bytes_per_device(state.opt, program.mesh))}",
            "folder": str(run.folder()),
        },
    )
    if jax.process_count() > 1:
        print(system.describe(program.batch_sharding(), run.batch), flush=True)


def lora(run: Run, state: State) -> str:
    """What is trained in place of the weights, in words."""
    learnt, weights = sum(x.size for x in jax.tree.leaves(state.model)), len(state.model)
    return f"rank {run.lora.rank}, alpha {run.lora.alpha:g}, beside {weights} weights: {count(learnt)} parameters"


def local(run: Run, workers: int) -> str:
    """What local SGD does, in words."""
    how = run.local
    parts = f" in {how.fragments} fragments" if how.fragments > 1 else ""
    return f"{workers} workers, {how.delta} changes{parts} every {how.every} steps, outer lr {how.lr:g}"


def samples(program: Program, dataset, ledger: Ledger, state: State, step: int) -> None:
    """Completes the run's prompts after a step, shows them and keeps them in samples/."""
    run, records = program.run, ledger.records
    if not run.prompts or dataset.tokenizer is None:
        return
    ledger.spent.mark("steps")
    ledger.heartbeat(step, "evaluate")
    tokenizer, positions = dataset.tokenizer, min(run.sequence, run.model.positions)
    how = Sampling(tokens=min(64, positions // 2), temperature=0.7, top_p=0.9)
    encode = getattr(dataset, "asked", lambda text: tokenizer.encode(text).ids)
    prompts = [encode(text)[-(positions - how.tokens) :] for text in run.prompts]
    texts = [
        tokenizer.decode(tokens)
        for tokens in complete(program.whole(state), prompts, how, positions=positions, end=dataset.end)
    ]
    gap = "\n" if hasattr(dataset, "asked") else ""  # an answer is no continuation
    for prompt, text in zip(run.prompts, texts, strict=True):
        ledger.display.sample(prompt, gap + text)
    if records:
        path = records.folder / "samples" / f"{step}.json"
        path.parent.mkdir(exist_ok=True)
        written = [dict(prompt=p, text=t) for p, t in zip(run.prompts, texts, strict=True)]
        path.write_text(json.dumps(redact.tree(written), indent=1))
        records.text(step, "samples", "\n\n".join(p + gap + t for p, t in zip(run.prompts, texts, strict=True)))
    ledger.spent.mark("evaluate")


def summary(program: Program, facts: dict[str, float], dataset, folder: Path, display: Display, seconds: float):
    """How it ended, against general-purpose compressors where the data is text, and what to do next."""
    run = program.run
    if "bits_per_byte" in facts:
        rows = [
            (f"llmjax {run.name}", facts["bits_per_byte"]),
            *sorted(dataset.baselines.items(), key=lambda kv: kv[1]),
        ]
        display.table(["held-out text", "bits per byte"], [[name, f"{bits:.3f}"] for name, bits in rows])
    speed = [m["tokens_per_s"] for m in read(folder / "metrics.jsonl") if m.get("tokens_per_s")]
    rate = f", {sorted(speed)[len(speed) // 2]:,.0f} tokens/s" if speed else ""
    display.say(
        f"Done: {run.steps:,} steps in {duration(seconds)}{rate}; checkpoints, metrics and samples in {folder}."
    )
    step = kept.planned(run, Axes(**dict(program.mesh.shape)), program.accumulate)
    if step and speed:
        took = run.tokens / sorted(speed)[len(speed) // 2]
        display.say(f"Planned {1e3 * step:,.1f} ms/step, measured {1e3 * took:,.1f}: {100 * (step / took - 1):+.0f}%.")
    with contextlib.suppress(Refused):  # begun by a version that kept no time
        display.say(goodput.line(goodput.of(read(folder / "events.jsonl"), read(folder / "metrics.jsonl"))))
    display.say(next_steps(run))


def next_steps(run: Run) -> str:
    """What a user can do with a finished run; with one that was taught to answer, talk."""
    itself = run.folder() / "run.json"  # the experiment's name may be another than the run's, or a file
    lines = [f"  llmjax train {itself} --name {run.name}_longer --steps {2 * run.steps}"]
    if run.prompts:
        at = "" if run.runs == "runs" else f" --runs {run.runs}"
        write = f'generate {run.name}{at} --prompt "def parse"'
        talks = (run.folder() / chat.ALONE).is_file()
        lines.insert(0, f"  llmjax {f'chat {run.name}{at}' if talks else write} --temperature 0.8")
    return "Next:\n" + "\n".join(lines)


def write_environment(folder: Path, program: Program, devices: list, state: State, data: str) -> None:
    """env.json: versions, commit, devices, mesh, sizes and data of this start, and what was planned for it."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    facts = dict(
        python=platform.python_version(),
        versions=between.versions(),
        commit=git.stdout.strip() or None,
        devices=[str(device) for device in devices[:64]],
        device_count=len(devices),
        device_kind=devices[0].device_kind,
        processes=jax.process_count(),
        mesh=dict(program.mesh.shape),
        layout=program.run.layout.name,
        parameters=program.size(state),
        flops_per_token=program.flops_per_token,  # of the model, with causal attention
        peak=program.peak,  # bfloat16 FLOP/s of all devices
        bytes_per_device=dict(
            parameters=bytes_per_device((state.model, state.frozen), program.mesh),
            optimizer=bytes_per_device(state.opt, program.mesh),
        ),
        planned=kept.plan(program.run, Axes(**dict(program.mesh.shape)), program.accumulate),
        data=data,
    )
    (folder / "env.json").write_text(json.dumps(facts, indent=1) + "\n")
