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
METRICS = ["step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_ms", "mfu", "data_wait_ms"]
EVALUATION = ["step", "eval_loss", "eval_targets"]
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
    (folder / "text.py").write_text(TEXT)
    (folder / "corpus").mkdir()
    for number in range(10):
        (folder / "corpus" / f"{number}.txt").write_text(f"a quick brown fox jumps over the lazy dog {number}. " * 40)
    return Place(folder)


@pytest.fixture(scope="module")
def whole(place) -> dict[str, Ended]:
    """What became of three runs that nothing has disturbed, done side by side."""
    wild = ("--optimizer.lr", "1e30", "--clip", "0", "--save-every", "1", "--processes.devices", "1")
    ends = place.together(
        ("train", "synthetic.py", "--name", "golden", *FOUR),
        ("train", "text.py", "--processes.devices", "1"),
        ("train", "synthetic.py", "--name", "wild", *wild),
    )
    return dict(zip(("golden", "text", "wild"), ends, strict=True))


@pytest.fixture(scope="module")
def golden(place, whole) -> Path:
    """The directory of an unbroken run on four devices."""
    assert (whole["golden"].code, whole["golden"].err) == (0, "") and "Done: 24 steps" in whole["golden"].out
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
    assert next(path.name for path in (golden / "tb").iterdir()).startswith("events.out.tfevents")
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


def test_killed_stopped_and_damaged_a_run_ends_with_the_curve_and_the_weights_of_an_unbroken_one(place, golden):
    command, folder = ("train", "synthetic.py", "--name", "broken", *FOUR), place.runs / "broken"
    checkpoints = Checkpoints(folder / "checkpoints")

    def kill(lines):
        assert place.signalled(signal.SIGKILL, "broken", lines, *command).code == -signal.SIGKILL
        assert lines <= len(metrics(folder)) < len(metrics(golden)) and "finish" not in kinds(folder)

    def stop(number, lines):
        ended = place.signalled(number, "broken", lines, *command)
        step = metrics(folder)[-1]["step"]
        assert (ended.code, ended.err) == (75, "")
        assert "Stopping after this step; saving. Press Ctrl-C again to leave at once." in ended.out
        assert f"Stopped and saved after step {step} of 24: run the same command to continue." in ended.out
        assert checkpoints.latest() == step < STEPS and kinds(folder)[-1] == "stop"

    kill(lines=2)
    stop(signal.SIGINT, lines=6)
    assert losses(folder).tolist() == losses(golden).tolist()[: checkpoints.latest()]

    older, newest = checkpoints.steps()
    damaged = checkpoints.folder / str(newest)
    (damaged / "state" / "manifest.ocdbt").write_bytes(b"")
    before = content(checkpoints.folder)
    refused = place.run(*command)
    sentence = f"llmjax: checkpoint {damaged} cannot be read (its list of arrays is damaged): "
    assert refused.err == f"{sentence}delete that folder to continue from step {older}.\n"
    assert refused.code == 65 and content(checkpoints.folder) == before
    shutil.rmtree(damaged)  # the remedy

    stop(signal.SIGTERM, lines=len(metrics(folder)) + 3)
    kill(lines=len(metrics(folder)) + 4)
    done = place.run(*command)
    assert (done.code, done.err) == (0, "") and "Continuing runs/broken from step" in done.out
    assert curve(folder) == curve(golden)
    assert equal(arrays(folder), arrays(golden))
    assert not list(checkpoints.folder.glob("*tmp*"))


def test_a_loss_that_is_not_finite_ends_the_run_before_its_step_is_saved(place, whole):
    ended = whole["wild"]
    bad = metrics(place.runs / "wild")[-1]
    assert ended.code == 70 and not np.isfinite([bad["loss"], bad["grad_norm"]]).all()
    assert ended.err.startswith(f"llmjax: step {bad['step']}: the loss is ") and ended.err.count("\n") == 1
    assert "so training stopped and this step was not saved: lower --optimizer.lr" in ended.err
    assert Checkpoints(place.runs / "wild" / "checkpoints").latest() == bad["step"] - 1
    assert kinds(place.runs / "wild")[-1] == "fault"


def test_a_run_on_text_measures_bits_per_byte_and_keeps_samples(place, whole):
    folder = place.runs / "text"
    assert (whole["text"].code, whole["text"].err) == (0, "") and "bits per byte" in whole["text"].out
    assert [path.name for path in (folder / "samples").iterdir()] == ["24.json"]
    samples = json.loads((folder / "samples" / "24.json").read_text())
    assert [sample["prompt"] for sample in samples] == ["a quick", "the lazy"] and all(s["text"] for s in samples)
    evaluations = [line for line in metrics(folder) if "eval_loss" in line]
    assert [list(line) for line in evaluations] == [["step", "eval_loss", "bits_per_byte", "eval_targets"]] * 3
    assert (folder / "tokenizer.json").is_file()


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


def test_two_processes_stop_together_and_compute_what_one_does(place, golden):
    folder = place.runs / "pair"
    launch = ("launch", "--processes", "2", "--devices", "2", "--logs", "logs", "train", "synthetic.py")
    ended = place.signalled(signal.SIGINT, "pair", 10, *launch, "--name", "pair")
    step = metrics(folder)[-1]["step"]
    assert (ended.code, ended.err) == (75, "") and f"Stopped and saved after step {step} of 24" in ended.out
    assert Checkpoints(folder / "checkpoints").latest() == step < STEPS
    assert (place.folder / "logs" / "process_1.log").read_text() == "process 1 of 2: 2 of 4 devices, 8 of 16 rows\n"
    done = place.run(*launch, "--name", "pair")
    assert (done.code, done.err) == (0, "") and f"Continuing runs/pair from step {step}." in done.out
    assert "devices  4 x cpu, 2 processes" in done.out
    assert "process 0 of 2: 2 of 4 devices, 8 of 16 rows" in done.out
    assert (place.folder / "logs" / "process_1.log").read_text() == "process 1 of 2: 2 of 4 devices, 8 of 16 rows\n"
    np.testing.assert_allclose(losses(folder), losses(golden), rtol=1e-6)
    evaluated = [[(e["step"], e["eval_loss"]) for e in metrics(f) if "eval_loss" in e] for f in (folder, golden)]
    np.testing.assert_allclose(*evaluated, rtol=1e-6)
    np.testing.assert_equal([e["kind"] for e in read(folder / "events.jsonl")].count("finish"), 1)


def test_a_launch_passes_on_what_its_processes_refuse(place):
    ended = place.run("launch", "--processes", "2", "--devices", "1", "train", "text.py", "--data.path", "nowhere")
    assert ended.code == 65 and ended.err.count("nowhere") == 1 and "Traceback" not in ended.err + ended.out


def test_the_tutorial_s_network_has_the_same_weights_on_any_devices(place):
    train = ("train", "tutorial_mlp", "--name")
    ends = place.together(
        *((*train, f"mlp{n}", "--processes.devices", str(n)) for n in (1, 2, 4)),
        ("launch", "--processes", "2", "--devices", "2", "--logs", "logs_mlp", *train, "mlp_pair"),
    )
    assert [(done.code, done.err) for done in ends] == [(0, "")] * 4
    one = arrays(place.runs / "mlp1")
    assert {name for name in one if name.startswith("model")} == {
        f"model.{layer}.{part}" for layer in ("hidden", "out") for part in ("kernel", "bias")
    }
    for other in ("mlp2", "mlp4", "mlp_pair"):
        for name, array in arrays(place.runs / other).items():
            np.testing.assert_allclose(array, one[name], rtol=1e-6, atol=1e-6, err_msg=f"{other} {name}")
