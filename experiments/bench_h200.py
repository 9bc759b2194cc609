"""GPT-2 124M and a 1.2 B Llama on one H200, beside compiled PyTorch, inside eight minutes; `run` is the first of them.

    python -m experiments.bench_h200              # everything; bench_h200.json holds what has been measured so far
    python -m experiments.bench_h200 --small      # the same path with a small model, on any machine

Each measurement is an `llmjax bench` of its own with a limit of time: one that fails or takes too long leaves the
others. Not measured yet. What is aimed at, counting causal attention: GPT-2 45 % MFU (558k tokens/s), the Llama 55 %
(66k tokens/s), each at least 1.10 times PyTorch compiled, with flash attention.
"""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments import gpt2_124m_h200
from llmjax.run import Remat

run = dataclasses.replace(gpt2_124m_h200.run, batch=32, accumulate=1, remat=Remat())


@dataclasses.dataclass(frozen=True)
class Case:
    """A command line of `llmjax bench`."""

    words: str
    seconds: float
    "What it may take; processes, compilation and all."
    torch: bool = False
    "Beside PyTorch, where that is installed."


GPT2 = "gpt2_124m_h200 --accumulate 1 --remat.policy none"
LLAMA = "llama_1b_h200 --accumulate 1"
H200 = (  # what matters most comes first: the last ones may find no time left
    Case(f"{GPT2} --batch 32", 150, torch=True),
    Case(f"{LLAMA} --batch 4", 200, torch=True),
    Case(f"{GPT2} --batch 64", 60),
    Case(f"{LLAMA} --batch 8", 90),
    Case(f"{LLAMA} --batch 4 --remat.policy dots", 90),
    Case(f"{GPT2} --batch 16", 60),
)
SMALL = (
    Case("bench_tiny --repeats 10", 200, torch=True),
    Case("bench_tiny --repeats 10 --batch 24", 60),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures training on one H200."""

    small: bool = False
    "A small model, to see the whole path on any machine."
    seconds: float = 480.0
    "For everything together."
    json: str = "bench_h200.json"
    "File for the results; it is rewritten after each one."


def measure_all(cases: Iterable[Case], options: Options) -> list[dict[str, Any]]:
    """The result of each case, or why there is none; also written to the file after each."""
    began, found = time.monotonic(), []
    for case in cases:
        left = options.seconds - (time.monotonic() - began)
        result = measure(case, min(case.seconds, left)) if left > 5 else {"failed": "no time was left"}
        found.append(dict(words=case.words, **result))
        written = Path(f"{options.json}.new")
        written.write_text(json.dumps(dict(seconds=time.monotonic() - began, cases=found), indent=1) + "\n")
        written.replace(options.json)
        print(line(found[-1]), flush=True)
    return found


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """What one `llmjax bench` writes, or the last line it said."""
    words = case.words.split() + ["--torch"] * (case.torch and importlib.util.find_spec("torch") is not None)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "result.json"
        command = [sys.executable, "-m", "llmjax.cli", "bench", *words, "--json", str(written)]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            said = process.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.communicate()
            return {"failed": f"it was ended after {seconds:.0f} s"}
        if process.returncode:
            last = said.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            return {"failed": last[0]}
        return json.loads(written.read_text())


def line(result: dict[str, Any]) -> str:
    """A result in a line of text."""
    if "failed" in result:
        return f"{result['words']}: {result['failed']}"
    mfu = f", {100 * result['mfu']:.1f}% MFU" if result["mfu"] else ""
    compiled = result.get("torch", {}).get("compiled", {})
    beside = f", {compiled['ratio']:.2f}x compiled PyTorch" if "ratio" in compiled else ""
    memory = f"{result['memory_bytes'] / 1e9:.1f} GB, compiled in {result['compile_s']:.0f} s"
    return f"{result['words']}: {result['tokens_per_s']:,.0f} tokens/s{mfu}{beside}, {memory}"


if __name__ == "__main__":
    import tyro

    asked = tyro.cli(Options)
    cases = measure_all(SMALL if asked.small else H200, asked)
    sys.exit(any("failed" in case for case in cases))
