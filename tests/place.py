"""A place where tests start commands, break them, and look at what became of the runs."""

import contextlib
import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.train.records import read

STEPS = 24
METRICS = ["step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_ms", "mfu", "data_wait_ms", "elapsed"]
EVALUATION = ["step", "eval_loss", "eval_targets", "elapsed"]
LIMIT = 240  # seconds for any command

EXPERIMENT = '''
"""A small run."""

from llmjax.data.dataset import Synthetic, Text
from llmjax.data.tokenizer import Bytes
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.run import Run
from llmjax.train.loss import NextToken
from meshes import local

run = Run(
    model=Llama(vocab={vocab}, layers=2, width=32, heads=4, kv_heads=4, head_dim=8, ff=64, positions=16),
    data={data},
    optimizer=AdamW(lr=3e-3),
    loss=NextToken(),
    mesh=local.cluster,
    steps=24,
    batch=16,
    sequence=16,
    dtype="float32",
    eval_every=8,
    save_every=4,
    prompts={prompts},
)
'''
SYNTHETIC = EXPERIMENT.format(vocab=64, data="Synthetic(vocab=64, rows=256)", prompts="()")
TEXT = EXPERIMENT.format(
    vocab=260, data='Text(path="corpus", tokenizer=Bytes(), heldout=0.2)', prompts='("a quick", "the lazy")'
)
FOUR = ("--processes.devices", "4")


def prepared(folder: Path) -> "Place":
    """A folder with the experiments `synthetic.py` and `text.py`."""
    (folder / "synthetic.py").write_text(SYNTHETIC)
    (folder / "text.py").write_text(TEXT)
    (folder / "corpus").mkdir()
    for number in range(10):
        (folder / "corpus" / f"{number}.txt").write_text(f"a quick brown fox jumps over the lazy dog {number}. " * 40)
    return Place(folder)


@dataclasses.dataclass(frozen=True)
class Ended:
    """What became of a command."""

    code: int
    out: str
    err: str


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder with experiment files, runs and a compile cache; starts commands there."""

    folder: Path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @contextlib.contextmanager
    def started(self, *words: str, patch: str = "") -> Iterator[subprocess.Popen]:
        """A command while it runs; whatever is left of it and of its children afterwards is killed.

        With a `patch`, these lines of Python come before the command's own, in its process.
        """
        settings = dict(
            JAX_COMPILATION_CACHE_DIR=str(self.folder / "compiled"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1"
        )
        process = subprocess.Popen(
            [sys.executable, *self.entry(patch), *words],
            cwd=self.folder, env=os.environ | settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
                for child in children.read_text().split() if children.exists() else ():
                    os.kill(int(child), signal.SIGKILL)
                process.kill()
                process.communicate()

    def entry(self, patch: str) -> list[str]:
        """What Python runs as the command."""
        if not patch:
            return ["-m", "llmjax.cli"]
        path = self.folder / f"patched_{hashlib.sha256(patch.encode()).hexdigest()[:16]}.py"
        path.write_text(f"{patch}\nfrom llmjax import cli\n\ncli.main()\n")
        return [str(path)]

    def run(self, *words: str, patch: str = "") -> Ended:
        """Runs a command to its end."""
        with self.started(*words, patch=patch) as process:
            return ended(process)

    def signalled(self, number: int, run: str, lines: int, *words: str) -> Ended:
        """Runs a command, and sends it a signal as soon as the metrics of a run have so many lines."""
        with self.started(*words) as process:
            until = time.monotonic() + LIMIT
            while process.poll() is None and len(metrics(self.runs / run)) < lines:
                assert time.monotonic() < until
                time.sleep(0.002)
            process.send_signal(number)  # does nothing to one that has ended
            return ended(process)


def ended(process: subprocess.Popen) -> Ended:
    out, err = process.communicate(timeout=LIMIT)
    return Ended(process.returncode, out, err)


def metrics(folder: Path) -> list[dict]:
    return read(folder / "metrics.jsonl")


def curve(folder: Path) -> list[tuple]:
    """What was computed, without what was timed; as text, so that equal means equal in every bit."""
    return [
        tuple((key, repr(line[key])) for key in ("step", "loss", "grad_norm", "lr", "eval_loss") if key in line)
        for line in metrics(folder)
    ]


def losses(folder: Path) -> np.ndarray:
    """[steps, 2]: loss and gradient norm of every step, each step once and in order."""
    lines = [line for line in metrics(folder) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([(line["loss"], line["grad_norm"]) for line in lines])


def arrays(folder: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, by default of the newest."""
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step = checkpoints.latest() if step is None else step
        stored = ocp.metadata(checkpoints.folder / str(step)).metadata
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one) for name, a in stored.items()}
        return jax.tree.map(np.asarray, checkpoints.restore(step, wanted))


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether two sets of arrays are the same in every bit."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file, which Orbax loads without a word."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kinds(folder: Path) -> list[str]:
    """What happened, without what the time was spent on."""
    return [event["kind"] for event in read(folder / "events.jsonl") if event["kind"] != "spent"]
