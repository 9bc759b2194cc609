"""S1-S10: killed at every stage of a save, at random times and while restoring, a run ends as an unbroken one."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from matrix import PAIR, address, counted, one_of, rows, same, slowly, train
from place import content, ended, metrics

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
KILLS = 5  # of each run that is killed at random times
STAGES = {
    "S1 killed before the folder of a save exists": """
save = checkpoints.Checkpoints.save
checkpoints.Checkpoints.save = lambda self, step, *a: die() if step == 12 else save(self, step, *a)
""",
    "S2 killed when the folder exists and no data": """
from orbax.checkpoint._src.path import atomicity
create = atomicity.AtomicRenameTemporaryPath.create
async def created(self):
    path = await create(self)
    return die() if "12.unsealed" in str(path) else path
atomicity.AtomicRenameTemporaryPath.create = created
""",
    "S3 killed once the first file of arrays is there": "watch(lambda: len(files('**', 'd', '*')) >= 1)",
    "S3 killed once half the files of a save are there": "watch(lambda: len(files('**')) >= 5)",
    "S3 killed once all files of a save but one are there": "watch(lambda: len(files('**')) >= 9)",
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


def killed_at(stage):
    @counted("kills survived", 1)
    def row(place, golden):
        name = f"{stage[:2]}_{list(STAGES).index(stage)}"
        died = place.run(*train(name), patch=DIE + f"NAME = {name!r}\n" + STAGES[stage])
        assert died.code == -signal.SIGKILL, died
        folder = place.runs / name
        assert "finish" not in (folder / "events.jsonl").read_text()
        names = {path.name for path in (folder / "checkpoints").iterdir()}
        assert names >= {"8"}, names
        begun = [path for path in (folder / "checkpoints").glob("12.unsealed*/**/*") if path.is_file()]
        if stage[:2] in ("S1", "S2", "S3"):
            assert bool(begun) == (stage[:2] == "S3"), begun
        done = place.run(*train(name))
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
        same(killed_again_and_again(place, name, seed, KILLS, train(name), slowly(0.2), lambda pid, _: pid), golden)

    return row


def one_of_two(pid, draw):
    """A process of a launch."""
    while len(children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()) < 2:
        time.sleep(0.01)
    return int(draw.choice(children))


@counted("kills survived", 6)
def restoring(place, golden):
    """A second kill, at three points of the restore that follows the first."""
    for number, point in enumerate(("verify", "facts", "restore")):
        name = f"S10_{point}"
        died = place.run(
            *train(name), patch=DIE + f"NAME = {name!r}\n" + STAGES["S8 killed in the middle of the pruning"]
        )
        assert died.code == -signal.SIGKILL
        folder = place.runs / name / "checkpoints"
        before = content(folder)
        patch = f"""
call = checkpoints.Checkpoints.{point}
checkpoints.Checkpoints.{point} = lambda *a, **k: (call(*a, **k), die())
"""
        assert place.run(*train(name), patch=DIE + patch).code == -signal.SIGKILL
        assert content(folder) == before, number
        done = place.run(*train(name))
        assert (done.code, done.err) == (0, "")
        same(place.runs / name, golden)


ROWS = {stage: killed_at(stage) for stage in STAGES}
ROWS |= {f"S9 killed at random times, seed {seed}": chain(seed) for seed in range(10)}
ROWS |= {"S10 killed again while it restores": restoring}


@pytest.mark.parametrize("row", rows(ROWS, fast=("S5", "S6")))
def test_a_killed_run_ends_as_an_unbroken_one(row, outcome):
    outcome(row)


def launched(name):
    return (*PAIR[:-1], f"logs_{name}", "train", "synthetic.py", "--name", name)


@pytest.mark.faults
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage[:2] in ("S4", "S5", "S6")])
def test_s4_s5_s6_a_run_of_two_processes_whose_save_is_killed_ends_as_an_unbroken_one(stage, place, golden_pair):
    name, at = f"pair_{list(STAGES).index(stage)}", address()
    first, second = (one_of(at, 2, index, name, "--processes.patience", "10") for index in (0, 1))
    with counted("kills of one of two processes survived", 1):
        dies = DIE + f"NAME = {name!r}\n" + STAGES[stage]
        with place.started(*first, patch=dies) as process, place.started(*second) as other:
            assert ended(process).code == -signal.SIGKILL
            assert ended(other).code not in (0, 75)
        done = place.run(*launched(name))
        assert done.code == 0 and f"Continuing runs/{name} from step 8." in done.out
        same(place.runs / name, golden_pair)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(4))
def test_s9_a_run_of_which_one_of_two_processes_is_killed_ends_as_an_unbroken_one(seed, place, golden_pair):
    name = f"S9_pair_{seed}"
    with counted("kills of one of two processes survived", KILLS):
        same(killed_again_and_again(place, name, seed, KILLS, launched(name), "", one_of_two), golden_pair)
