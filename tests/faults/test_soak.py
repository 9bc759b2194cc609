"""G2: ten minutes of random faults cost no step and leave nothing behind."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from matrix import COUNTS
from place import SYNTHETIC, curve, metrics

SECONDS, EVERY, STEPS = 600, 10, 200
FEW = ("--steps", str(STEPS), "--processes.devices", "2", "--eval-every", "40")

# A data set that takes its time, so that a run lasts as long as the faults do.
SLOW = SYNTHETIC.replace("from llmjax.data.dataset import Synthetic, Text", "from slowly import Synthetic").replace(
    "from llmjax.data.tokenizer import Bytes\n", ""
)
SLOWLY = f"""
import dataclasses, time
from llmjax.data import dataset

@dataclasses.dataclass(frozen=True)
class Synthetic(dataset.Synthetic):
    pause: float = {SECONDS / STEPS / 2}

    def open(self, sequence, cache, say=print):
        return Slow(self.vocab, self.rows, sequence, self.pause)

class Slow(dataset.SyntheticDataset):
    def __init__(self, vocab, rows, sequence, pause):
        super().__init__(vocab, rows, sequence)
        object.__setattr__(self, "pause", pause)

    def examples(self, split, rows):
        time.sleep(self.pause if split == "train" else 0)
        return super().examples(split, rows)
"""


def working_in(folder: Path) -> set[int]:
    """The processes that work in a folder."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and Path(os.readlink(entry / "cwd")).is_relative_to(folder):
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def listening() -> set[str]:
    """The ports that anyone listens on."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return {line.split()[1] for line in lines if line.split()[3] == "0A"}


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def below(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@pytest.mark.soak
@pytest.mark.timeout(SECONDS * 3)
def test_g2_random_faults_for_ten_minutes_cost_no_step_and_leave_nothing_behind(place, tmp_path):
    draw, folder, temporary = random.Random(2), place.runs / "G2", tmp_path / "temporary"
    temporary.mkdir()
    (place.folder / "slow.py").write_text(SLOW)
    (place.folder / "slowly.py").write_text(SLOWLY)
    done = place.run("train", "slow.py", *FEW, "--name", "G2_golden", "--data.pause", "0")
    assert (done.code, done.err) == (0, "")

    ports, faults, began = listening(), 0, time.monotonic()
    sizes: list[int] = []
    patch = f"import os, tempfile\nos.environ['TMPDIR'] = tempfile.tempdir = {str(temporary)!r}\n"
    words = ("supervise", "--pause", "0.1", "--tries", "99", "--", "train", "slow.py", *FEW, "--name", "G2")
    with place.started(*words, patch=patch) as process:
        while process.poll() is None:
            time.sleep(draw.uniform(0.5, 1.5) * EVERY)
            sizes += [resident(process.pid)] if process.poll() is None else []
            if time.monotonic() - began < SECONDS:
                for child in below(process.pid):
                    os.kill(child, draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV]))
                    faults += 1
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, (out, err)
    assert faults >= 30
    assert (
        curve(folder) == curve(place.runs / "G2_golden") and len([m for m in metrics(folder) if "loss" in m]) == STEPS
    )
    assert sizes[-1] <= 1.05 * sizes[1], "the supervisor's memory grew"
    assert not working_in(place.folder) and listening() <= ports and not list(temporary.iterdir())
    assert all(path.name.isdecimal() for path in (folder / "checkpoints").iterdir())
    COUNTS["random faults survived in a soak"] = [faults, faults]
