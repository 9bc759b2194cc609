"""Processes are started, told apart and ended; their exit codes say what happened."""

import json
import os
import signal
import textwrap
import threading
import time

import jax
import pytest
from jax.sharding import NamedSharding

from llmjax import launch as launching
from llmjax import mesh as meshes
from llmjax import processes
from llmjax.errors import Refused
from llmjax.launch import exit_code, launch
from llmjax.mesh import Axes
from llmjax.processes import Processes, start
from meshes import cpu8, h100x8, local, tpu7x_64, v5p_64

# A process that says what it was given and then does as its first argument says: a list of exit codes, or of
# "sleep", one for each process. Asked to stop, it ends with 75.
ENDER = """
    import json, pathlib, signal, sys, time
    given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
    index = int(given["--processes.index"])
    signal.signal(signal.SIGINT, lambda *_: sys.exit(75))
    print(json.dumps(given), flush=True)
    print(f"noise of {index}", file=sys.stderr, flush=True)
    action = sys.argv[1].split(",")[index]
    pathlib.Path(f"ready_{index}").touch()
    if action == "sleep":
        time.sleep(60)
    sys.exit(int(action))
"""


@pytest.fixture
def ender(tmp_path, monkeypatch):
    """Launches processes that end as told; returns the code of the launch."""
    (tmp_path / "ender.py").write_text(textwrap.dedent(ENDER))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launching, "GRACE", 0.5)
    return lambda actions: launch(len(actions.split(",")), 3, [actions], tmp_path / "logs", module="ender")


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([], 0),
        ([0, 0], 0),
        ([75, 75], 75),
        ([0, 75], 75),
        ([2, 0], 2),
        ([0, 65], 65),
        ([1, 0], 1),
        ([-6, 65], 65),  # JAX kills the survivors of the process that refused its data
        ([76, 70], 70),
        ([1, 74], 74),
        ([-9, -6], 76),  # killed from outside: a peer is lost
        ([75, -9], 76),
        ([75, 1], 1),
        ([1, -6], 1),
    ],
)
def test_the_code_of_a_group_names_the_cause_and_not_its_consequences(codes, expected):
    assert exit_code(codes) == expected


@pytest.mark.parametrize(
    ("cluster", "settings", "words"),
    [
        (local, dict(coordinator="10.0.0.1"), "processes.coordinator is '10.0.0.1': give host:port"),
        (local, dict(coordinator=":8476", count=2), "give host:port"),
        (local, dict(coordinator="10.0.0.1:8476"), "processes.count is 0: say how many"),
        (local, dict(coordinator="10.0.0.1:8476", count=2), "processes.index is -1: give 0 to 1, one each"),
        (local, dict(coordinator="10.0.0.1:8476", count=2, index=2), "processes.index is 2: give 0 to 1"),
        (local, dict(count=2), "processes.coordinator is empty: give host:port of process 0, or use `llmjax launch`"),
        (local, dict(index=1), "processes.coordinator is empty"),
        (local, dict(devices=-1), "processes.devices is -1: give a positive number, or 0"),
        (cpu8, dict(coordinator="127.0.0.1:1", count=3, index=0), "mesh cpu8 has 8 devices, which 3 processes do not"),
        (cpu8, dict(devices=4), "which 1 processes of 4 devices do not make: choose --mesh local"),
        (v5p_64, {}, "mesh v5p_64 needs 64 devices and this machine has 8 cpu: choose --mesh local, or emulate eight"),
        (tpu7x_64, {}, "mesh tpu7x_64 needs 128 devices and this machine has 8 cpu"),
        (h100x8, {}, "mesh h100x8 is of H100 chips and this machine has cpu: choose --mesh local, or emulate"),
    ],
)
def test_settings_and_meshes_that_cannot_be_are_refused(cluster, settings, words):
    with pytest.raises(Refused) as refusal:
        start(cluster.cluster, Processes(**settings))
    assert words in str(refusal.value) and refusal.value.code == 2


def test_a_second_run_in_one_interpreter_finds_the_same_devices():
    assert start(cpu8.cluster) == start(local.cluster) == start(local.cluster, Processes(count=1)) == jax.devices()
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        ({}, False),  # nothing to leave out: JAX itself finds no cluster
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, True),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "a,b"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "4", "SLURM_NTASKS": "1"}, False),  # mpirun inside an allocation of one task
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "TPU_WORKER_HOSTNAMES": "a,b"}, False),
    ],
)
def test_a_task_of_its_own_is_not_taken_for_a_cluster(environment, alone):
    assert processes._lone_task(environment) == alone


def test_a_process_says_its_share_of_devices_and_rows():
    mesh = meshes.device_mesh(Axes(2, 1, 2, 1, 1, 2), jax.devices())
    sharding = NamedSharding(mesh, jax.P(None, ("data", "fsdp")))
    assert processes.describe(sharding, 16) == "process 0 of 1: 8 of 8 devices, 16 of 16 rows"


@pytest.mark.parametrize(("actions", "expected"), [("0,0", 0), ("0,65", 65), ("2,2", 2), ("75,75", 75)])
def test_a_launch_ends_with_the_code_of_its_processes(ender, actions, expected):
    assert ender(actions) == expected


def test_process_0_has_the_terminal_and_the_others_a_log_each(ender, capfd, tmp_path):
    assert ender("0,0,0") == 0
    shown = capfd.readouterr()
    given = [shown.out, *((tmp_path / "logs" / f"process_{i}.log").read_text() for i in (1, 2))]
    assert shown.err == "noise of 0\n" and "noise of 1" in given[1] and "noise of 2" in given[2]
    settings = [json.loads(text.splitlines()[0]) for text in given]
    assert [s.pop("--processes.index") for s in settings] == ["0", "1", "2"]
    assert settings[0].pop("--processes.coordinator").startswith("127.0.0.1:")
    assert settings[0] == {"--processes.count": "3", "--processes.devices": "3"}


def test_the_others_are_ended_when_one_fails(ender):
    assert ender("sleep,70") == 70


def test_ctrl_c_reaches_every_process_and_the_launch_waits_for_them(ender, tmp_path):
    def interrupt():
        while not all((tmp_path / f"ready_{i}").exists() for i in (0, 1)):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert ender("sleep,sleep") == 75
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_launch_of_nothing_or_without_a_place_for_logs_is_refused(tmp_path):
    with pytest.raises(Refused, match="launch got 0 processes of 4 devices: give at least one of each"):
        launch(0, 4, ["train"], tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="cannot take the logs") as refusal:
        launch(1, 1, ["train"], tmp_path / "file" / "logs")
    assert refusal.value.code == 74
