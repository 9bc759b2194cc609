"""S1-S10: killed at every stage of a save, at random times and while restoring, a run ends as an unbroken one."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from matrix import PAIR, counted, rows, same
from place import FOUR, content, metrics

from llmjax.checkpoint.checkpoints import Checkpoints

# Lines that come before the command: it dies by SIGKILL at a stage of the save of step 12, the third.
DIE = """
import os, signal, threading, time
from llmjax.checkpoint import checkpoints, folder, manifest
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
def at(step, do, call):
    return lambda *a, **k: do() if any(str(step) in str(x) for x in a[-3:]) else call(*a, **k)
def watch(seen):
    def look():
        while not seen():
            time.sleep(2e-4)
        die()
    threading.Thread(target=look, daemon=True).start()
def files(*parts):
    import glob
    return [p for p in glob.glob(os.path.join("runs", NAME, "checkpoints", "12.unsealed*", *parts), recursive=True)
            if os.path.isfile(p)]
"""
SLOW = "\nfrom llmjax.train import loop\nread = loop.Reporter.read\n" + (
    "loop.Reporter.read = lambda self, pending: (time.sleep(0.05), read(self, pending))[1]\n"
)
KILLS = 5  # of each run that is killed at random times
STAGES = {
    "S1 killed before the folder of a save exists": """
save = checkpoints.Checkpoints.save
checkpoints.Checkpoints.save = lambda self, step, *a: die() if step == 12 else save(self, step, *a)
""",
    "S2 killed when the folder exists and no data": """
import glob
watch(lambda: glob.glob(f"runs/{NAME}/checkpoints/12.unsealed*"))
""",
    "S3 killed after the first file of arrays": "watch(lambda: len(files('**', 'd', '*')) >= 1)",
    "S3 killed after half the files of a save": "watch(lambda: len(files('**')) >= 5)",
    "S3 killed after all files but the last of a save": "watch(lambda: len(files('**')) >= 9)",
    "S4 killed before the processes' files are merged": """
from orbax.checkpoint._src.serialization import ocdbt_utils
merge = ocdbt_utils.merge_ocdbt_per_process_files
ocdbt_utils.merge_ocdbt_per_process_files = at("12.unsealed", die, merge)
""",
    "S5 killed after the data and before its commit": """
from orbax.checkpoint._src.path import atomicity
finalize = atomicity.AtomicRenameTemporaryPath.finalize
atomicity.AtomicRenameTemporaryPath.finalize = lambda self, *a, **k: (
    die() if "12.unsealed" in str(self.get_final()) else finalize(self, *a, **k))
""",
    "S5 killed after the commit and before the manifest": """
manifest.write = at("12.unsealed", die, manifest.write)
""",
    "S6 killed after the manifest and before the step has its name": """
from pathlib import Path
rename = Path.rename
Path.rename = lambda self, to: die() if str(to).endswith("/12") else rename(self, to)
""",
    "S7 killed after the step has its name and before the pruning": """
folder.prune = at(12, die, folder.prune)
""",
    "S8 killed in the middle of the pruning": """
import shutil
rmtree = shutil.rmtree
def half(path, **how):
    if str(path).endswith("4.dropped") and path.exists():
        (path / "MANIFEST.json").unlink()
        die()
    rmtree(path, **how)
shutil.rmtree = half
""",
}


def command(name, *more):
    return ("train", "synthetic.py", "--name", name, *FOUR, *more)


def killed_at(stage):
    @counted("kills survived", 1)
    def row(place, golden):
        name = f"{stage[:2]}_{list(STAGES).index(stage)}"
        died = place.run(*command(name), patch=DIE + f"NAME = {name!r}\n" + STAGES[stage])
        assert died.code == -signal.SIGKILL, died
        folder = place.runs / name
        assert "finish" not in (folder / "events.jsonl").read_text()
        names = {path.name for path in (folder / "checkpoints").iterdir()}
        assert names >= {"8"}, names
        done = place.run(*command(name))
        assert (done.code, done.err) == (0, "")
        assert f"Continuing runs/{name} from step {12 if stage[:2] in ('S7', 'S8') else 8}." in done.out
        same(folder, golden)
        assert Checkpoints(folder / "checkpoints").steps() == [20, 24]

    return row


def killed_again_and_again(place, name, seed, kills, words, patch, victim):
    """A run that is killed at random times, and at last left to come to its end."""
    draw, folder = random.Random(seed), place.runs / name
    for _ in range(kills):
        with place.started(*words, patch=patch) as process:
            lines, until = len(metrics(folder)), time.monotonic() + draw.choice([3.0, 5.0, 60.0])
            while process.poll() is None and time.monotonic() < until and len(metrics(folder)) <= lines:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.5))
            assert process.poll() is None, "it came to its end before it could be killed"
            os.kill(victim(process.pid, draw), signal.SIGKILL)
            process.communicate(timeout=120)
            assert process.returncode != 0
    done = place.run(*words)
    assert done.code == 0, done
    return folder


def chain(seed):
    @counted("kills survived", KILLS)
    def row(place, golden):
        name = f"S9_{seed}"
        slow = "import time\n" + SLOW
        same(killed_again_and_again(place, name, seed, KILLS, command(name), slow, lambda pid, _: pid), golden)

    return row


def one_of_two(pid, draw):
    """A process of a launch, or the launcher where there is none yet."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(draw.choice(children)) if len(children) == 2 else pid


@counted("kills survived", 6)
def restoring(place, golden):
    """A second kill, at three points of the restore that follows the first."""
    for number, point in enumerate(("verify", "facts", "restore")):
        name = f"S10_{point}"
        died = place.run(
            *command(name), patch=DIE + f"NAME = {name!r}\n" + STAGES["S8 killed in the middle of the pruning"]
        )
        assert died.code == -signal.SIGKILL
        folder = place.runs / name / "checkpoints"
        before = content(folder)
        patch = f"""
call = checkpoints.Checkpoints.{point}
checkpoints.Checkpoints.{point} = lambda *a, **k: (call(*a, **k), die())
"""
        assert place.run(*command(name), patch=DIE + patch).code == -signal.SIGKILL
        assert content(folder) == before, number
        done = place.run(*command(name))
        assert (done.code, done.err) == (0, "")
        same(place.runs / name, golden)


ROWS = {stage: killed_at(stage) for stage in STAGES}
ROWS |= {f"S9 killed at random times, seed {seed}": chain(seed) for seed in range(10)}
ROWS |= {"S10 killed again while it restores": restoring}


@pytest.mark.parametrize("row", rows(ROWS, fast=("S5", "S6")))
def test_a_killed_run_ends_as_an_unbroken_one(row, outcome):
    outcome(row)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(4))
def test_s9_a_run_of_which_one_of_two_processes_is_killed_ends_as_an_unbroken_one(seed, place, golden_pair):
    name = f"S9_pair_{seed}"
    words = (*PAIR[:-1], f"logs_{name}", "train", "synthetic.py", "--name", name)
    with counted("kills of one of two processes survived", KILLS):
        same(killed_again_and_again(place, name, seed, KILLS, words, "", one_of_two), golden_pair)
