"""Our train step beside PyTorch's of the same model: processes of their own that take turns, A-B-A-B."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from llmjax import allocator
from llmjax.bench import worker
from llmjax.data.dataset import Synthetic
from llmjax.errors import Refused
from llmjax.models.gpt2 import GPT2
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.run import Run, to_json
from llmjax.train.loss import NextToken

ROUNDS = 5  # turns of each contender; what slows the machine for a while then slows all of them

Answer = dict[str, Any]


def check(run: Run) -> None:
    """Refuses what PyTorch cannot be measured with, before anything is started."""
    if importlib.util.find_spec("torch") is None:
        raise Refused("torch is asked for and not installed: pip install 'llmjax[torch]', or leave out --torch.")
    for field, kinds in dict(model=(Llama, GPT2), optimizer=(AdamW,), loss=(NextToken,)).items():
        if type(getattr(run, field)) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise Refused(
                f"{field} is {type(getattr(run, field)).__name__}, which the PyTorch reference lacks: "
                f"bench with {names}, or leave out --torch."
            )
    if run.local.every or run.loss.z:
        field = "local.every" if run.local.every else "loss.z"
        raise Refused(f"{field} is not 0, and the PyTorch reference has no such thing: set it to 0.")


def compare(run: Run, warmup: int, repeats: int) -> dict[str, Answer]:
    """What each contender answered, by its name, with `turns`: the seconds of its steps, `repeats` or a few more.

    One that failed says why under `failed`.

    Raises:
      Refused: ours cannot be measured.
    """
    sent = to_json(dataclasses.replace(run, data=Synthetic(vocab=run.model.vocab)))  # data may be of a user's class
    with contextlib.ExitStack() as stack:
        processes, found = {}, {}
        for kind in worker.KINDS:  # one is ready before the next one starts; a refusal of ours starts no other
            processes[kind] = stack.enter_context(_started(ours=kind == "ours"))
            found[kind] = _asked(processes[kind], json.dumps({"run": sent, "kind": kind}))
        for count in (warmup, *(-(-repeats // ROUNDS),) * ROUNDS):
            for kind, process in processes.items():
                if count and "failed" not in found[kind]:
                    answer = _asked(process, str(count))
                    turns = [*found[kind].get("turns", []), answer.pop("seconds", [])]
                    found[kind] |= answer | {"turns": turns}
        for kind, process in processes.items():
            found[kind] |= {} if "failed" in found[kind] else _asked(process, None)
            found[kind]["turns"] = found[kind].get("turns", [])[1 if warmup else 0 :]
    return found


def ratios(ours: list[list[float]], theirs: list[list[float]]) -> list[float]:
    """How many times as fast ours was, in each turn."""
    return [statistics.median(b) / statistics.median(a) for a, b in zip(ours, theirs, strict=True)]


@contextlib.contextmanager
def _started(ours: bool) -> Iterator[subprocess.Popen]:
    """A worker, which waits for its first line; PyTorch's in the environment that its user would have."""
    # By default XLA takes three quarters of a GPU's memory at the start, and nothing would be left for PyTorch.
    environment = (os.environ if ours else allocator.without(os.environ)) | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    line, pipe = [sys.executable, "-m", "llmjax.bench.worker"], subprocess.PIPE
    process = subprocess.Popen(line, env=environment, text=True, bufsize=1, stdin=pipe, stdout=pipe)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _asked(process: subprocess.Popen, line: str | None) -> Answer:
    """A worker's answer to a line, or to the end of its input."""
    with contextlib.suppress(BrokenPipeError):
        if line is None:
            process.stdin.close()
        else:
            process.stdin.write(line + "\n")
    said = process.stdout.readline()
    if not said:
        return {"failed": f"its process ended with exit code {process.wait()}"}
    answer = json.loads(said)
    if "refused" in answer:
        raise Refused(answer["refused"])
    return answer
