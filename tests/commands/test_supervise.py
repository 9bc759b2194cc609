"""A supervised run is started again for as long as that helps, and nothing of it outlives its supervisor.

The children are small scripts that say how far they are and end as told.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from llmjax import cli
from llmjax.commands import supervise as command
from llmjax.commands.supervise import Options, pause, spare_words, supervise
from llmjax.errors import Refused, TooFewDevices
from llmjax.train.records import read
from meshes import cpu8, local

# Start n does what the n-th entry of plan.json says, [step reached, how to end]: an exit code, minus a signal, or
#   "few"    too few devices, exit 2
#   "wait"   for SIGTERM or SIGINT, of which it counts all; then exits 75
#   "hang"   as do a child of it, in a group of its own, which is stopped as well
CHILD = """
    import faulthandler, json, os, pathlib, signal, subprocess, sys, time
    faulthandler.register(signal.SIGUSR1)
    with open("starts.jsonl", "a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\\n")
    count = len(pathlib.Path("starts.jsonl").read_text().splitlines())
    step, end = json.loads(pathlib.Path("plan.json").read_text())[count - 1]
    heartbeat = pathlib.Path(sys.argv[sys.argv.index("--supervised.heartbeat") + 1])

    def beat(phase):
        said = dict(step=step, phase=phase, folder=os.path.abspath("run"))
        heartbeat.with_suffix(".new").write_text(json.dumps(said))
        heartbeat.with_suffix(".new").replace(heartbeat)

    def hang_here():
        below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], process_group=0)
        pathlib.Path("pids").write_text(f"{os.getpid()} {below.pid}")
        below.send_signal(signal.SIGSTOP)
        time.sleep(60)

    def wait():
        got = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: got.append(number))
        pathlib.Path("pids").write_text(str(os.getpid()))
        while not got:
            time.sleep(0.02)
        time.sleep(0.3 if step else 60)
        pathlib.Path("signals").write_text(" ".join(map(str, got)))

    if step:
        beat("train")
    if end == "few":
        beat("start")
        heartbeat.with_suffix(".too_few").touch()
        sys.exit(2)
    if end == "hang":
        hang_here()
    if end == "wait":
        wait()
        sys.exit(75)
    if end < 0:
        os.kill(os.getpid(), -end)
    sys.exit(end)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(textwrap.dedent(CHILD))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.jsonl").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "STACKS", 0.5)
    return tmp_path


@dataclasses.dataclass(frozen=True)
class Ended:
    code: int
    starts: list[list[str]]


@pytest.fixture
def ran(folder):
    """ran(plan, options) supervises children that follow the plan."""

    def run(*plan, spare=(), words=("train", "mine"), **options) -> Ended:
        (folder / "plan.json").write_text(json.dumps(plan))
        (folder / "starts.jsonl").write_text("")
        code = supervise(Options(**dict(pause=0.01) | options), words, spare, module="child")
        lines = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
        return Ended(code, [line[: line.index("--supervised.heartbeat")] for line in lines])

    return run


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def pids(folder: Path) -> list[int]:
    """The processes that a child has named, once it has."""
    until = time.monotonic() + 30
    while not (folder / "pids").exists() or not (folder / "pids").read_text():
        assert time.monotonic() < until
        time.sleep(0.02)
    return [int(pid) for pid in (folder / "pids").read_text().split()]


@pytest.mark.parametrize("code", [0, 2, 65, 70])
def test_an_end_that_would_come_again_is_final_and_passed_on(ran, code):
    ended = ran([0, code], [0, 0])
    assert (ended.code, len(ended.starts)) == (code, 1)


def test_preemption_a_lost_peer_a_full_disk_a_signal_and_a_crash_are_started_again(ran, folder):
    ended = ran([1, 75], [2, 76], [3, 74], [4, -9], [5, -6], [6, 1], [7, 0], tries=1, pause=0.001)
    assert (ended.code, len(ended.starts)) == (0, 7)  # one try in a row, and each came further
    found = [(e["kind"], e["code"], e["attempt"]) for e in read(folder / "run" / "events.jsonl")]
    codes = (75, 76, 74, -9, -6, 1)
    assert found == [("restart", code, attempt) for attempt, code in enumerate(codes, 1)]


def test_W6_a_run_that_comes_no_further_is_given_up_with_a_report(ran, capfd):
    ended = ran([5, -9], [3, 1], [5, -9], [0, 1], [9, 0])
    assert (ended.code, len(ended.starts)) == (1, 4)  # the first came further, three did not
    report = capfd.readouterr().err.splitlines()[-4:]
    assert "3 starts in a row came no further" in report[0]
    said = [line.partition("a start ")[2].partition(", after")[0] for line in report[1:]]
    assert said == ["ended with code 1 at step 3", "was ended by SIGKILL at step 5", "ended with code 1 at step 0"]


def test_a_restart_is_one_line_that_says_why_how_long_and_from_where(ran, folder, capfd):
    for step in (4, 8):
        (folder / "run" / "checkpoints" / str(step)).mkdir(parents=True)
        (folder / "run" / "checkpoints" / str(step) / "file").touch()
    assert ran([9, -9], [10, 0]).code == 0
    line, *others = capfd.readouterr().err.splitlines()
    assert not others and line.startswith("llmjax supervise: start 1 was ended by SIGKILL at step 9: starting again in")
    assert line.endswith(" 0.0 s, from the checkpoint of step 8.")


def test_a_start_that_dies_before_it_says_where_its_run_is_is_recorded_there_too(ran, folder):
    assert ran([4, -9], [0, -9], [5, 0]).code == 0
    found = [(e["kind"], e["attempt"]) for e in read(folder / "run" / "events.jsonl")]
    assert found == [("restart", 1), ("restart", 2)]


def test_half_a_line_at_the_end_of_the_ledger_does_not_spoil_the_next(ran, folder):
    (folder / "run" / "events.jsonl").write_text('{"kind": "start", "step": 0}\n{"kind": "sav')
    assert ran([1, -9], [2, 0]).code == 0
    start, restart = read(folder / "run" / "events.jsonl")
    assert start["step"] == 0 and restart.keys() == {"kind", "time", "elapsed", "code", "reason", "attempt"}
    assert restart["reason"] == "was ended by SIGKILL"


def test_of_several_supervisors_the_first_process_s_keeps_the_ledger(ran, folder, monkeypatch):
    assert ran([1, 1], [2, 0], words=("train", "mine", "--processes.index", "1")).code == 0
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert ran([1, 1], [2, 0]).code == 0
    assert read(folder / "run" / "events.jsonl") == []
    assert ran([1, 1], [2, 0], words=("train", "mine", "--processes.index", "0")).code == 0
    assert len(read(folder / "run" / "events.jsonl")) == 1


def test_waits_double_have_a_cap_and_differ_a_little():
    assert [pause(1, idle, 1) // 1 for idle in (0, 1, 2, 3)] == [1, 1, 2, 4]
    assert 300 <= pause(1, 10_000, 1) <= 360 and pause(1, 1, 74) >= 10
    assert len({pause(1, 1, 1) for _ in range(10)}) > 1


def test_a_hang_shows_the_stacks_ends_every_process_and_starts_again(ran, folder, capfd):
    ended = ran([3, "hang"], [4, 0], hang=0.5)
    assert (ended.code, len(ended.starts)) == (0, 2)
    shown = capfd.readouterr().err
    assert "gave no sign of life for 0.5 s" in shown and "in hang_here" in shown
    assert [alive(pid) for pid in pids(folder)] == [False, False]
    assert read(folder / "run" / "events.jsonl")[0]["reason"] == "gave no sign of life for 0.5 s"


def test_before_its_first_step_a_run_has_longer(ran, capfd):
    ended = ran([0, "hang"], [1, 0], hang=0.1, hang_start=1.5)
    assert (ended.code, len(ended.starts)) == (0, 2)
    assert "the run gave no sign of life for 1.5 s" in capfd.readouterr().err
    assert ran([1, 0], hang=0.1, hang_start=0).code == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_passes_that_on_once_and_ends_with_the_run_s_code(ran, folder, number):
    def ask():
        pids(folder)
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may repeat itself

    thread = threading.Thread(target=ask, daemon=True)
    before = signal.getsignal(number)
    thread.start()
    ended = ran([1, "wait"], [2, 0])
    thread.join()
    assert (ended.code, len(ended.starts)) == (75, 1)
    assert (folder / "signals").read_text() == str(int(number))
    assert signal.getsignal(number) is before and not alive(pids(folder)[0])


def test_asked_to_stop_between_two_starts_it_starts_no_more(ran, folder):
    def ask():
        while not read(folder / "run" / "events.jsonl"):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    ended = ran([1, 75], [2, 0], pause=60)
    thread.join()
    assert (ended.code, len(ended.starts)) == (75, 1)


def test_a_second_ctrl_c_leaves_at_once_and_nothing_behind(ran, folder):
    def ask():
        pids(folder)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        ran([0, "wait"])  # it would take a minute
    thread.join()
    assert not alive(pids(folder)[0])


def test_a_supervisor_that_is_killed_takes_the_run_with_it(folder):
    (folder / "plan.json").write_text('[[1, "wait"]]')
    code = "from llmjax.commands.supervise import *; supervise(Options(), ['train'], module='child')"
    with subprocess.Popen([sys.executable, "-c", code]) as supervisor:
        (child,) = pids(folder)
        assert alive(child)
        supervisor.kill()
    until = time.monotonic() + 10
    while alive(child) and time.monotonic() < until:
        time.sleep(0.02)
    assert not alive(child)


SPARE = ("--fallback-mesh", "cpu4", "--supervised.fallback")


@pytest.mark.parametrize("end", [76, -9, "few"])
def test_after_two_starts_that_lost_devices_it_falls_back_and_has_all_its_tries_again(ran, end):
    ended = ran([4, end], [4, end], [0, end], [0, 1], [0, 1], [5, 0], spare=SPARE)
    first = ["train", "mine"]
    fell_back = ended.starts.index([*first, *SPARE])
    assert fell_back == 3 and ended.starts[:3] == [first] * 3  # the first start came further
    assert all(start == [*first, *SPARE] for start in ended.starts[fell_back:])
    assert (ended.code, len(ended.starts)) == (0, 6)


def test_what_shows_no_loss_of_devices_does_not_make_it_fall_back(ran):
    ended = ran([0, 1], [0, 76], [0, 1], [5, 0], spare=SPARE)
    assert (ended.code, len(ended.starts)) == (1, 3) and not any("--supervised.fallback" in s for s in ended.starts)
    ended = ran([0, 2], [5, 0], spare=SPARE)
    assert (ended.code, len(ended.starts)) == (2, 1)  # a mistake stays one
    ended = ran([0, "few"], [5, 0])
    assert (ended.code, len(ended.starts)) == (2, 1)  # as there is nothing to fall back to


def test_a_run_says_in_a_file_that_its_devices_are_too_few(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TooFewDevices) as refusal:
        cli._dispatch("train", ["stdlib_tiny", "--mesh", "v5p_64", "--supervised.heartbeat", "1.json"])
    assert refusal.value.code == 2 and (tmp_path / f"1{command.TOO_FEW}").exists()
    with pytest.raises(Refused):
        cli._dispatch("train", ["stdlib_tiny", "--clip", "-1", "--supervised.heartbeat", "2.json"])
    assert not (tmp_path / f"2{command.TOO_FEW}").exists()


def test_a_launch_falls_back_to_as_many_processes_as_have_the_devices():
    asked, words = Options(fallback_mesh="cpu8"), ["launch", "--processes", "4", "--devices", "4", "train"]
    added = ["--fallback-mesh", "cpu8", "--processes", "2", "--supervised.fallback"]
    assert spare_words(asked, words, cpu8.cluster) == added
    assert spare_words(Options(fallback=True), words, cpu8.cluster) == added[2:]
    assert spare_words(asked, ["train"], cpu8.cluster) == [*added[:2], added[-1]]
    assert spare_words(Options(fallback=True), words, local.cluster) == added[-1:]
    with pytest.raises(Refused, match=r"cpu8 has 8 devices, which processes of 3 \(launch --devices\) do not make"):
        spare_words(asked, ["launch", "--devices=3", "train"], cpu8.cluster)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "supervise got nothing to run: give train, or launch ... train, and their options."),
        ("-- trian", "supervise got trian to run: did you mean train?"),
        ("-- launch --processes 2 parity", "supervise got launch --processes 2 to run: give train"),
        ("--tries 0 -- train", "tries is 0: give at least 1."),
        ("--hang -1 train", "hang is -1.0: give a number of seconds."),
        ("--fallback -- train stdlib_tiny", "stdlib_tiny has no fallback_mesh: name a mesh to fall back to"),
        ("--fallback-mesh cpu9 train", "there is no mesh named 'cpu9': did you mean cpu8?"),
        ("--fallback-mesh cpu8 launch --devices 3 train", "cpu8 has 8 devices, which processes of 3"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_started(line, words):
    with pytest.raises(Refused) as refusal:
        cli._dispatch("supervise", line.split())
    assert words in str(refusal.value) and refusal.value.code == 2
