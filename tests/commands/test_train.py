"""Training from the command line, in processes that are killed, stopped, moved to other meshes and started again.

Every command is a process of its own, with a compile cache that all of them share.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

from llmjax import cli
from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import Checkpoints, like
from llmjax.mesh import Axes
from llmjax.train.program import make
from llmjax.train.records import read

STEPS = 24
METRICS = "step loss grad_norm lr tokens tokens_per_s step_ms mfu data_wait_ms".split()
EVALUATION = "step eval_loss eval_targets".split()
LIMIT = 240  # seconds for any command

SYNTHETIC = f'''
"""A small run."""

from llmjax.data.dataset import Synthetic
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.run import Run
from llmjax.train.loss import NextToken
from meshes import local

run = Run(
    model=Llama(vocab=64, layers=2, width=32, heads=4, kv_heads=4, head_dim=8, ff=64, positions=16),
    data=Synthetic(vocab=64, rows=256),
    optimizer=AdamW(lr=3e-3),
    loss=NextToken(),
    mesh=local.cluster,
    steps={STEPS},
    batch=16,
    sequence=16,
    dtype="float32",
    eval_every=8,
    save_every=4,
)
'''
TEXT = f'''
"""A small run on text."""

import dataclasses
from pathlib import Path

from llmjax.data.dataset import Text
from llmjax.data.tokenizer import Bytes
from llmjax_file_synthetic import run as synthetic

run = dataclasses.replace(
    synthetic,
    model=dataclasses.replace(synthetic.model, vocab=260, positions=32),
    data=Text(path=str(Path(__file__).parent / "corpus"), tokenizer=Bytes(), heldout=0.2),
    steps={STEPS},
    prompts=("a quick", "the lazy"),
    name="text",
)
'''
FOUR = ("--processes.devices", "4")


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
    def started(self, *words: str) -> Iterator[subprocess.Popen]:
        """A command while it runs; whatever is left of it and of its children afterwards is killed."""
        settings = dict(
            JAX_COMPILATION_CACHE_DIR=str(self.folder / "compiled"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1"
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "llmjax.cli", *words],
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

    def together(self, *commands: tuple[str, ...]) -> list[Ended]:
        """Runs commands side by side, to their end."""
        with contextlib.ExitStack() as stack:
            return [ended(process) for process in [stack.enter_context(self.started(*words)) for words in commands]]

    def run(self, *words: str) -> Ended:
        """Runs a command to its end."""
        return self.together(words)[0]

    def signalled(self, number: int, run: str, lines: int, *words: str) -> Ended:
        """Runs a command, and sends it a signal as soon as the metrics of a run have so many lines."""
        with self.started(*words) as process:
            until = time.monotonic() + LIMIT
            while len(metrics(self.runs / run)) < lines:
                assert process.poll() is None and time.monotonic() < until, process.communicate()
                time.sleep(0.002)
            process.send_signal(number)
            return ended(process)


def ended(process: subprocess.Popen) -> Ended:
    out, err = process.communicate(timeout=LIMIT)
    return Ended(process.returncode, out, err)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("train")
    (folder / "synthetic.py").write_text(SYNTHETIC)
    (folder / "corpus").mkdir()
    for number in range(10):
        (folder / "corpus" / f"{number}.txt").write_text(f"a quick brown fox jumps over the lazy dog {number}. " * 40)
    return Place(folder)


@pytest.fixture(scope="module")
def golden(place) -> Path:
    """The directory of a run on four devices that nothing has disturbed."""
    done = place.run("train", "synthetic.py", "--name", "golden", *FOUR)
    assert (done.code, done.err) == (0, "") and "Done: 24 steps" in done.out
    return place.runs / "golden"


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
    checkpoints = Checkpoints(folder / "checkpoints")
    step = checkpoints.latest() if step is None else step
    stored = ocp.metadata(checkpoints.folder / str(step)).metadata
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one) for name, a in stored.items()}
    return jax.tree.map(np.asarray, checkpoints.restore(step, wanted))


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether two sets of arrays are the same in every bit."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kinds(folder: Path) -> list[str]:
    return [event["kind"] for event in read(folder / "events.jsonl")]


def test_a_run_directory_holds_what_was_promised(golden):
    names = {"run.json", "env.json", "metrics.jsonl", "events.jsonl", "tb", "checkpoints"}
    assert {path.name for path in golden.iterdir()} == names
    assert Checkpoints(golden / "checkpoints").steps() == [20, 24]  # the newest two
    assert [path.name for path in (golden / "tb").iterdir()][0].startswith("events.out.tfevents")
    assert kinds(golden) == ["start", *["save"] * 6, "finish"]
    lines = metrics(golden)
    assert [list(line) for line in lines if "loss" in line] == [METRICS] * STEPS
    assert [list(line) for line in lines if "loss" not in line] == [EVALUATION] * 3
    assert [line["step"] for line in lines if "loss" not in line] == [8, 16, 24]
    assert [line["tokens"] for line in lines if "loss" in line] == [256 * step for step in range(1, STEPS + 1)]
    assert all(line["mfu"] is None for line in lines if "loss" in line)  # the peak of a CPU is not known
    environment = json.loads((golden / "env.json").read_text())
    assert environment["device_count"] == 4 and environment["mesh"]["data"] == 4 and environment["processes"] == 1
    assert {"jax", "flax", "optax", "orbax-checkpoint"} <= environment["versions"].keys()


def test_a_finished_run_says_so_and_changes_no_file(place, golden):
    before = content(golden)
    again = place.run("train", "synthetic.py", "--name", "golden", *FOUR)
    assert (again.code, again.err) == (0, "") and "Run golden is finished: 24 steps" in again.out
    assert content(golden) == before


def test_run_json_fed_back_computes_the_same_bit_for_bit(place, golden):
    done = place.run("train", str(golden / "run.json"), "--name", "other", *FOUR)
    assert (done.code, done.err) == (0, "")
    assert curve(place.runs / "other") == curve(golden)
    assert equal(arrays(place.runs / "other"), arrays(golden))


def test_after_two_kills_the_curve_and_the_weights_are_those_of_an_unbroken_run(place, golden):
    command = ("train", "synthetic.py", "--name", "killed", *FOUR)
    folder = place.runs / "killed"
    for lines in (2, 13):
        assert place.signalled(signal.SIGKILL, "killed", lines, *command).code == -signal.SIGKILL
        assert lines <= len(metrics(folder)) < len(metrics(golden)) and "finish" not in kinds(folder)
    done = place.run(*command)
    assert (done.code, done.err) == (0, "") and "Continuing runs/killed from step" in done.out
    assert curve(folder) == curve(golden)
    assert equal(arrays(folder), arrays(golden))
    assert not list((folder / "checkpoints").glob("*tmp*"))


@pytest.fixture(scope="module")
def stopped(place) -> Path:
    """The directory of a run on four devices that Ctrl-C has stopped."""
    ended = place.signalled(signal.SIGINT, "stopped", 6, "train", "synthetic.py", "--name", "stopped", *FOUR)
    folder = place.runs / "stopped"
    last = metrics(folder)[-1]["step"]
    assert (ended.code, ended.err) == (75, "")
    assert "Stopping after this step; saving. Press Ctrl-C again to leave at once." in ended.out
    assert f"Stopped and saved after step {last} of 24: run the same command to continue." in ended.out
    assert Checkpoints(folder / "checkpoints").latest() == last < STEPS and kinds(folder)[-1] == "stop"
    return folder


def test_stopped_by_ctrl_c_and_by_sigterm_it_continues_to_the_same_curve(place, golden, stopped):
    folder = shutil.copytree(stopped, place.runs / "continued")
    command = ("train", "synthetic.py", "--name", "continued", *FOUR)
    lines = len(metrics(folder)) + 3
    ended = place.signalled(signal.SIGTERM, "continued", lines, *command)
    assert (ended.code, ended.err) == (75, "") and "Stopped and saved after step" in ended.out
    assert Checkpoints(folder / "checkpoints").latest() == metrics(folder)[-1]["step"] < STEPS
    done = place.run(*command)
    assert (done.code, done.err) == (0, "")
    assert curve(folder) == curve(golden)
    assert equal(arrays(folder), arrays(golden))


def test_a_damaged_newest_checkpoint_is_refused_and_the_remedy_works(place, golden, stopped):
    folder = shutil.copytree(stopped, place.runs / "damaged")
    command = ("train", "synthetic.py", "--name", "damaged", *FOUR)
    older, newest = Checkpoints(folder / "checkpoints").steps()
    damaged = folder / "checkpoints" / str(newest)
    (damaged / "state" / "manifest.ocdbt").write_bytes(b"")
    before = content(folder / "checkpoints")
    refused = place.run(*command)
    assert refused.code == 65 and "Traceback" not in refused.err
    assert refused.err.startswith(f"llmjax: checkpoint {damaged} cannot be read (")
    assert refused.err.endswith(f"): delete that folder to continue from step {older}.\n")
    assert content(folder / "checkpoints") == before
    shutil.rmtree(damaged)
    done = place.run(*command)
    assert done.code == 0 and f"Continuing runs/damaged from step {older}." in done.out
    assert curve(folder) == curve(golden)
    assert equal(arrays(folder), arrays(golden))


def test_a_loss_that_is_not_finite_ends_the_run_before_its_step_is_saved(place):
    command = ("train", "synthetic.py", "--name", "wild", "--optimizer.lr", "1e30", "--clip", "0", "--save-every", "1")
    ended = place.run(*command, "--processes.devices", "1")
    bad = metrics(place.runs / "wild")[-1]
    assert ended.code == 70 and not np.isfinite([bad["loss"], bad["grad_norm"]]).all()
    assert ended.err.startswith(f"llmjax: step {bad['step']}: the loss is ") and ended.err.count("\n") == 1
    assert "so training stopped and this step was not saved: lower --optimizer.lr" in ended.err
    assert Checkpoints(place.runs / "wild" / "checkpoints").latest() == bad["step"] - 1
    assert all(np.isfinite(array).all() for array in arrays(place.runs / "wild").values())


def test_a_run_continues_on_another_mesh_and_on_other_processes(place, golden):
    layout = ("--layout", "fsdp_tp")
    first = (*layout, "--processes.devices", "8", "--axes.fsdp", "4", "--axes.tensor", "2")
    ended = place.signalled(signal.SIGINT, "4x2", 13, "train", "synthetic.py", "--name", "4x2", *first)
    at = Checkpoints(place.runs / "4x2" / "checkpoints").latest()
    assert (ended.code, ended.err) == (75, "") and 11 <= at < STEPS
    names = ("2x4", "one", "two")
    for name in names:
        shutil.copytree(place.runs / "4x2", place.runs / name)
    train = ("train", "synthetic.py", *layout, "--name")
    ends = place.together(
        (*train, "2x4", "--processes.devices", "8", "--axes.fsdp", "2", "--axes.tensor", "4"),
        (*train, "one", "--processes.devices", "1"),
        ("launch", "--processes", "2", "--devices", "4", "--logs", "logs_4x2", *train, "two", *first[4:]),
    )
    for name, done in zip(names, ends, strict=True):
        assert (done.code, done.err) == (0, ""), name
        assert f"Continuing runs/{name} from step {at}." in done.out
        np.testing.assert_allclose(losses(place.runs / name), losses(golden), rtol=1e-5)
    at_once = np.array([losses(place.runs / name)[at] for name in names])  # the same state and the same batch
    np.testing.assert_allclose(at_once, at_once[:1].repeat(3, 0), rtol=1e-6)


@pytest.mark.parametrize("sizes", [(4, 2), (2, 4), (1, 8), (1, 1)])
def test_a_checkpoint_is_restored_bit_for_bit_on_any_mesh(place, sizes):
    run = dataclasses.replace(cli.load(str(place.folder / "synthetic.py")), layout=layouts.fsdp_tp)
    fsdp, tensor = sizes
    mesh = meshes.device_mesh(Axes(1, 1, fsdp, 1, 1, tensor), jax.devices()[: fsdp * tensor])
    stored = arrays(place.runs / "4x2")
    with (program := make(run, mesh, meshes.chip_of(run.mesh, jax.devices()))).context():
        wanted = like(program.abstract_state(), mesh)
        checkpoints = Checkpoints(place.runs / "4x2" / "checkpoints")
        state = checkpoints.restore(checkpoints.latest(), wanted)
    assert all(x.sharding == w.sharding for x, w in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True))
    assert equal(dict(zip(stored, map(np.asarray, jax.tree.leaves(state)), strict=True)), stored)
