"""`llmjax bench`: how fast an experiment's train step runs here, against the machine, PyTorch, or an earlier result."""

import dataclasses
import datetime
import json
import platform
import statistics
from itertools import chain
from pathlib import Path
from typing import Any

import jax

from llmjax.bench import beside, comparison, timing
from llmjax.errors import DONE, IO, Refused
from llmjax.processes import Processes
from llmjax.run import Run, to_json
from llmjax.train.display import Display, flop_rate, memory


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure and where to put it."""

    warmup: int = 3
    "Steps before the clock starts."
    repeats: int = 20
    "Steps that are timed."
    torch: bool = False
    "Time the same model in PyTorch as well, eager and compiled, by turns with ours, each in a process of its own."
    compare: tuple[str, ...] = ()
    "Two files that --json wrote: measure nothing, and show how the second differs from the first."
    json: str = ""
    "File for the result."


def bench(run: Run, processes: Processes, options: Options) -> int:
    """Times the train step on random tokens, each step waited for; prints medians.

    Raises:
      Refused: this run or these options make no benchmark.
    """
    if options.compare:
        return compare(options)
    check(run, processes, options)
    with Display().waiting(f"measuring {run.name}"):
        facts = with_torch(run, options) if options.torch else alone(run, processes, options)
    first = jax.process_index() == 0 if not options.torch else True
    show(run, facts, Display(quiet=not first))
    if options.json and first:
        Path(options.json).write_text(json.dumps(facts | {"run": to_json(run)}, indent=1) + "\n", encoding="utf-8")
    return DONE


def check(run: Run, processes: Processes, options: Options) -> None:
    """Refuses, before anything is compiled, what would fail after it."""
    if options.warmup < 0 or options.repeats < 1:
        raise Refused(f"warmup is {options.warmup} and repeats {options.repeats}: give at least 0 and 1.")
    if not hasattr(run.model, "vocab"):
        raise Refused(f"{run.name} is no language model: bench one of the others that `llmjax experiments` lists.")
    folder = Path(options.json).absolute().parent
    if not folder.is_dir():
        raise Refused(f"json is {options.json}, and {folder} is no folder: make it, or choose another file.", IO)
    if options.torch:
        if processes.count > 1 or processes.coordinator:
            raise Refused(f"torch runs in one process, and processes.count is {processes.count}: leave it out.")
        beside.check(run)


def alone(run: Run, processes: Processes, options: Options) -> dict[str, Any]:
    """The result of our train step, measured in this process."""
    program, devices = timing.program(run, processes)
    with program.context():
        steps = timing.Steps(program)
        timing.timed(steps, options.warmup)
        seconds = timing.timed(steps, options.repeats)
    measured = dict(
        compile_s=steps.compile_s, step_bytes=steps.bytes(), operands=program.compute.operands, peak=program.peak,
        flops_per_token=program.flops_per_token, accumulate=program.accumulate,
        devices=[device.device_kind for device in devices], process_bytes=timing.process_bytes(),
        peak_bytes=timing.peak_bytes(devices), matmul_flops_per_s=timing.matmul_rate(program.compute.operands, devices),
    )  # fmt: skip
    return result(run, measured, seconds)


def with_torch(run: Run, options: Options) -> dict[str, Any]:
    """The result of our train step with those of PyTorch's, under `torch`."""
    found = beside.compare(run, options.warmup, options.repeats)
    turns = {kind: answer.pop("turns") for kind, answer in found.items()}
    if "failed" in found["ours"]:
        raise RuntimeError(f"the train step failed in its process: {found['ours']['failed']}")
    torch = {}
    for kind, answer in found.items():
        if kind != "ours" and "failed" not in answer:
            each = beside.ratios(turns["ours"], turns[kind])
            ratio = dict(ratio=statistics.median(each), ratios=each)
            answer = speed(run, [*chain(*turns[kind])]) | ratio | answer
        torch[kind] = answer
    return result(run, torch.pop("ours"), [*chain(*turns["ours"])]) | {"torch": torch}


def speed(run: Run, seconds: list[float]) -> dict[str, Any]:
    """Medians and spread of steps that took so long."""
    found = timing.spread(seconds)
    return dict(
        tokens_per_s=run.batch * run.sequence / found.median, step_ms=1e3 * found.median, steps=len(seconds),
        quartiles_ms=[1e3 * each for each in found.quartiles], fastest_ms=1e3 * found.fastest,
        slowest_ms=1e3 * found.slowest,
    )  # fmt: skip


def result(run: Run, measured: dict[str, Any], seconds: list[float]) -> dict[str, Any]:
    """What `--json` writes of our train step, but for the run."""
    facts, per_token = speed(run, seconds), measured["flops_per_token"]
    flops = facts["tokens_per_s"] * per_token
    full = run.model.flops_per_token(run.sequence)[1] / per_token
    peak, rate = measured["peak"], measured["matmul_flops_per_s"]
    return facts | measured | dict(
        flops_per_s=flops, share_of_matmul=flops / rate,
        mfu=peak and flops / peak, mfu_full=peak and full * flops / peak,
        memory_bytes=measured["peak_bytes"] or measured["step_bytes"], jax=jax.__version__,
        python=platform.python_version(), machine=machine(), date=datetime.date.today().isoformat(),
    )  # fmt: skip


def machine() -> str:
    """The processor and the cores of it that this process may use."""
    found = Path("/proc/cpuinfo")
    lines = found.read_text(encoding="utf-8").splitlines() if found.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{timing.cores()} cores of {names[0] if names else platform.processor() or platform.machine()}"


def show(run: Run, facts: dict[str, Any], display: Display) -> None:
    """The result, for people."""
    low, high = facts["quartiles_ms"]
    peak = f"the device's peak, {memory(facts['peak_bytes'])}" if facts["peak_bytes"] else "of one device"
    rows = {
        "speed": f"{facts['tokens_per_s']:,.0f} tokens/s, {facts['step_ms']:.1f} ms/step "
        f"(median of {facts['steps']}; half of them {low:.1f} to {high:.1f}, all {facts['fastest_ms']:.1f} to "
        f"{facts['slowest_ms']:.1f})",
        "compute": f"{flop_rate(facts['flops_per_s'])} in {facts['operands']}, "
        f"{100 * facts['share_of_matmul']:.0f}% of this machine's matrix product "
        f"({flop_rate(facts['matmul_flops_per_s'])})",
        "mfu": f"{100 * facts['mfu']:.1f}% of the chips' bfloat16 peak ({100 * facts['mfu_full']:.1f}% if attention "
        "counted the whole square)"
        if facts["mfu"]
        else "not known: this chip's peak is not",
        "memory": f"{memory(facts['step_bytes'])} by the compiler, {peak}",
        "compile": f"{facts['compile_s']:.1f} s",
    }
    for kind, theirs in facts.get("torch", {}).items():
        rows[f"torch {kind}"] = f"failed: {theirs['failed']}" if "failed" in theirs else (
            f"{theirs['tokens_per_s']:,.0f} tokens/s: ours is {theirs['ratio']:.2f}x as fast "
            f"({min(theirs['ratios']):.2f} to {max(theirs['ratios']):.2f} in {len(theirs['ratios'])} turns)"
        )  # fmt: skip
    display.facts(f"llmjax bench {run.name}", rows)
    display.say(f"  on {facts['machine']}, {facts['date']}, Python {facts['python']}, jax {facts['jax']}")


def compare(options: Options) -> int:
    """Shows one result beside another."""
    if len(options.compare) != 2:
        raise Refused(f"compare names {len(options.compare)} files: give two that --json wrote, --compare A B.")
    first, second = options.compare
    found = comparison.compare(comparison.read(first), comparison.read(second))
    display = Display()
    display.table(["", Path(first).stem, Path(second).stem, "ratio"], found.rows)
    more = f"{abs(found.faster - 1):.1%} {'more' if found.faster >= 1 else 'fewer'} tokens/s"
    display.say(f"{second} has {more}{'' if found.clear else ', within the spread of the steps'}.")
    if found.differs:
        display.say(f"Not the same in both: {', '.join(found.differs)}.")
    if options.json:
        facts = dict(ratio=found.faster, clear=found.clear, differs=found.differs)
        Path(options.json).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return DONE
