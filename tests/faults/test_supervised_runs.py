"""W1, W2, W3, W6 and the supervisor's share of P1: real runs of two processes lose one, hang, or are preempted, and
come by themselves to the end that an undisturbed run comes to, bit for bit; on fewer devices, to the same numbers.
"""

import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from place import arrays, curve, equal

from llmjax import leash
from llmjax.train.records import read

STEPS = 40
LIMIT = 240  # seconds for any command
EXPERIMENT = """
from llmjax.data.dataset import Synthetic
from llmjax.mesh import Cluster
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.run import Run
from llmjax.train.loss import NextToken
from meshes import chips, local

run = Run(
    model=Llama(vocab=64, layers=2, width=32, heads=4, kv_heads=4, head_dim=8, ff=64, positions=16),
    data=Synthetic(vocab=64, rows=256), optimizer=AdamW(lr=3e-3), loss=NextToken(), mesh=local.cluster,
    fallback_mesh=Cluster("cpu2", chips.CPU, chips=2, emulated=True), steps=40, batch=16, sequence=16, dtype="float32",
    save_every=4,
)
"""
# Dies whenever it comes to the checkpoint of step 12.
DYING = """
import os, signal
from llmjax.train import between

save = between.save

def dying(program, state, step, *rest, **others):
    if step == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    save(program, state, step, *rest, **others)

between.save = dying
"""
PAIR = ("launch", "--processes", "2", "--devices", "2")
ALONE = ("--processes.devices", "2")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command while it runs, with what it says in files."""

    process: subprocess.Popen
    folder: Path
    name: str

    @property
    def run(self) -> Path:
        return self.folder / "runs" / self.name

    @property
    def said(self) -> str:
        return (self.folder / f"{self.name}.said").read_text()

    def ended(self) -> int:
        return self.process.wait(LIMIT)

    def until(self, what: Callable[[], object]) -> None:
        """Returns once it is so."""
        end = time.monotonic() + LIMIT
        while not what():
            assert self.process.poll() is None and time.monotonic() < end, self.said
            time.sleep(0.005)

    def trains(self, index: int) -> int | None:
        """The id of the train process of that index, if there is one, and no supervisor of it."""
        for pid in leash.tree(self.process.pid):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                given = dict(itertools.pairwise(words))
                if "--supervised.heartbeat" in words and given.get("--processes.index") == str(index):
                    return pid
        return None

    def signal_at(self, lines: int, number: int, index: int) -> list[int]:
        """Signals a train process when the run has so many metrics; returns the ids of both."""
        self.until(lambda: self.trains(0) and self.trains(1))
        pids = [self.trains(0), self.trains(1)]
        self.until(lambda: len(read(self.run / "metrics.jsonl")) >= lines)
        os.kill(pids[index], number)
        return pids

    def gone(self, pids: list[int], seconds: float) -> float:
        """Waits until none of the processes is left, for so long at most; returns for how long."""
        began = time.monotonic()
        while any(map(alive, pids)):
            assert time.monotonic() - began < seconds, self.said
            time.sleep(0.02)
        return time.monotonic() - began


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts commands in a folder with a compile cache; whatever is left of one afterwards is killed."""
    folder = tmp_path_factory.mktemp("supervise")
    (folder / "mine.py").write_text(EXPERIMENT)
    (folder / "dying.py").write_text(DYING + EXPERIMENT)
    cache = dict(JAX_COMPILATION_CACHE_DIR=str(folder / "compiled"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1")

    @contextlib.contextmanager
    def start(name: str, *words: str) -> Iterator[Command]:
        line = [sys.executable, "-m", "llmjax.cli", *words, "--name", name]
        with open(folder / f"{name}.said", "wb") as said:
            process = subprocess.Popen(
                line, cwd=folder, env=os.environ | cache, stdout=said, stderr=said, process_group=0
            )
        try:
            yield Command(process, folder, name)
        finally:
            leash.end(process)

    return start


@pytest.fixture(scope="module")
def golden(start) -> Path:
    """The run directory of two processes that nothing disturbs."""
    with start("golden", *PAIR, "train", "mine.py") as command:
        assert command.ended() == 0, command.said
    return command.run


def restarts(run: Path) -> list[dict]:
    return [event for event in read(run / "events.jsonl") if event["kind"] == "restart"]


def same(run: Path, golden: Path) -> bool:
    """Verdict A: the curve and the last checkpoint equal the undisturbed ones in every bit."""
    return curve(run) == curve(golden) and equal(arrays(run), arrays(golden))


SUPERVISED = ("supervise", "--pause", "0.1", "--", *PAIR)


@pytest.mark.parametrize(
    ("row", "index", "seconds"),
    [pytest.param("W1", 1, 15, marks=pytest.mark.fast), pytest.param("W2", 0, 5, marks=pytest.mark.faults)],
)
def test_W1_W2_a_process_is_killed_and_the_run_goes_on_by_itself_bit_for_bit(start, golden, row, index, seconds):
    with start(row, *SUPERVISED, "train", "mine.py", "--processes.patience", "10") as command:
        command.gone(command.signal_at(6, signal.SIGKILL, index), seconds)
        assert command.ended() == 0, command.said
    assert same(command.run, golden) and [event["code"] for event in restarts(command.run)] == [76]


@pytest.mark.faults
def test_W3_a_stopped_worker_is_found_shows_its_stack_and_the_run_goes_on_bit_for_bit(start, golden):
    words = ("supervise", "--pause", "0.1", "--hang", "6", "--", *PAIR, "--logs", "logs_w3", "train", "mine.py")
    with start("w3", *words) as command:
        command.gone(command.signal_at(6, signal.SIGSTOP, index=1), seconds=15)
        assert command.ended() == 0, command.said
    log = (command.folder / "logs_w3" / "process_1.log").read_text()
    assert "gave no sign of life for 6 s" in command.said
    assert "most recent call first" in command.said and "loop.py" in command.said  # of process 0
    assert "most recent call first" in log and "loop.py" in log  # of the stopped one
    assert same(command.run, golden) and len(restarts(command.run)) == 1


@pytest.mark.faults
def test_W6_a_run_that_dies_at_one_step_each_time_is_given_up_with_a_report(start):
    with start("w6", "supervise", "--pause", "0.1", "--", "train", "dying.py", *ALONE) as command:
        assert command.ended() == 128 + signal.SIGKILL, command.said
    starts = [event for event in read(command.run / "events.jsonl") if event["kind"] == "start"]
    assert 3 <= len(starts) <= 6 and starts[-1]["step"] in (4, 8)  # 8 may not be whole yet
    report = command.said.partition("3 starts in a row came no further")[2]
    assert report.count("a start was ended by SIGKILL at step") == 3


@pytest.mark.faults
def test_P1_a_preempted_run_is_started_again_and_a_preempted_supervisor_is_not(start, golden):
    words = (*SUPERVISED, "train", "mine.py")
    with start("p1", *words) as command:
        pids = command.signal_at(6, signal.SIGTERM, index=1)  # one of the two alone
        command.gone(pids, seconds=10)
        command.until(lambda: command.trains(1) and len(read(command.run / "metrics.jsonl")) >= 20)
        again = [pid for index in (0, 1) if (pid := command.trains(index))]
        command.process.send_signal(signal.SIGTERM)
        assert command.ended() == 75, command.said
        assert not any(map(alive, again))
    assert [event["code"] for event in restarts(command.run)] == [75]
    stopped = read(command.run / "events.jsonl")[-1]
    assert stopped["kind"] == "stop" and stopped["step"] < STEPS
    with start("p1", *words) as command:
        assert command.ended() == 0, command.said
    assert same(command.run, golden)


@pytest.mark.faults
def test_W1_processes_that_have_a_supervisor_each_find_each_other_again(start, golden):
    words = (*PAIR, "supervise", "--pause", "0.1", "--", "train", "mine.py", "--processes.patience", "10")
    with start("each", *words) as command:
        command.signal_at(6, signal.SIGKILL, index=1)
        assert command.ended() == 0, command.said
    assert same(command.run, golden)
    assert len(restarts(command.run)) == 1  # only the first process's supervisor records


@pytest.mark.faults
def test_W1_a_worker_that_never_comes_back_leaves_the_run_on_the_fall_back_mesh_with_the_same_batch(start, golden):
    """Verdict B: the same rows a step, and losses that agree to rounding."""
    with start("elastic", "supervise", "--pause", "0.1", "--fallback", "--", *PAIR, "train", "mine.py") as command:
        command.gone(command.signal_at(6, signal.SIGKILL, index=1)[1:], seconds=15)
        for _ in range(2):
            command.until(lambda: command.trains(1))
            pid = command.trains(1)
            os.kill(pid, signal.SIGKILL)
            command.gone([pid], seconds=15)
        assert command.ended() == 0, command.said
    starts = [event["devices"] for event in read(command.run / "events.jsonl") if event["kind"] == "start"]
    assert (starts, len(restarts(command.run))) == ([4, 2], 3) and "going on with the fall-back mesh" in command.said
    found, expected = (read(run / "metrics.jsonl") for run in (command.run, golden))
    for key in ("step", "tokens"):
        assert [line.get(key) for line in found] == [line.get(key) for line in expected]
    losses = [np.array([line["loss"] for line in lines if "loss" in line]) for lines in (found, expected)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
