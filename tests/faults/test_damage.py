"""K1-K7: a checkpoint that is not what was written is never trained on."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from matrix import copied, counted, rows, same, train
from place import SYNTHETIC, content, flip, losses, metrics

from llmjax.checkpoint.checkpoints import Checkpoints

STORED = Path(__file__).parent / "data"
FLIPS = 24  # of every file


def files_of(step):
    return sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)


def unfinished(golden, name):
    """A copy of a run that has not come to its end: as if it had been killed after its last save."""
    folder = copied(golden, name)
    lines = [line for line in (folder / "events.jsonl").read_text().splitlines() if '"finish"' not in line]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def every_file(place, golden, harm, why):
    """Each file of the newest step in turn: found, and for one of them the whole run from there."""
    folder = unfinished(golden, f"K_{why.split()[0]}")
    step, tried = folder / "checkpoints" / "24", 0
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for path in files_of(step):
            kept = path.read_bytes()
            for harmed in harm(kept):
                path.unlink() if harmed is None else path.write_bytes(harmed)
                with counted(f"{why} detected", 1):
                    assert checkpoints.verify(24), path
                    assert checkpoints.newest_verified() == 20
                tried += 1
                path.write_bytes(kept)
        assert checkpoints.verify(24) is None
    path = files_of(step)[-1]
    harmed = next(iter(harm(path.read_bytes())))
    path.unlink() if harmed is None else path.write_bytes(harmed)
    done = place.run(*train(folder.name))
    assert (done.code, done.err) == (0, "") and f"Continuing runs/{folder.name} from step 20." in done.out
    assert done.out.count("Passed over checkpoint") == 1
    same(folder, golden)
    return tried


def flipped(place, golden):
    draw = random.Random(0)

    def harm(kept):
        for _ in range(FLIPS):
            data = bytearray(kept)
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            yield bytes(data)

    assert every_file(place, golden, harm, "flipped bits") >= 200


def cut_short(place, golden):
    every_file(place, golden, lambda kept: (kept[:n] for n in (0, len(kept) // 2, len(kept) - 1)), "truncated files")


def removed(place, golden):
    every_file(place, golden, lambda kept: [None], "missing files")


def all_bad(place, golden):
    folder = unfinished(golden, "K4")
    for step in (20, 24):
        flip(files_of(folder / "checkpoints" / str(step))[-1])
    before = content(folder / "checkpoints")
    refused = place.run(*train("K4"))
    assert refused.code == 65 and refused.err.count("\n") == 1 and content(folder / "checkpoints") == before
    assert "24: " in refused.err and "20: " in refused.err and "--name" in refused.err
    assert [line["step"] for line in metrics(folder) if "loss" in line][-1] == 24  # and it did not begin anew


def foreign(place, golden):
    folder = unfinished(golden, "K5")
    held = folder / "checkpoints"
    (held / "99").mkdir()
    (held / "98").write_text("a file")
    (held / "97").symlink_to("/usr")
    (held / "..96").mkdir()
    (held / "095").mkdir()
    (held / "095" / "x").write_text("x")
    shutil.rmtree(held / "24")
    done = place.run(*train("K5"))
    assert (done.code, done.err) == (0, "") and done.out.count("Ignored ") == 5
    assert "Continuing runs/K5 from step 20." in done.out
    assert (held / "97").is_symlink() and (held / "98").read_text() == "a file"
    for name in ("99", "..96", "095"):
        shutil.rmtree(held / name)
    (held / "98").unlink()
    (held / "97").unlink()
    same(folder, golden)


def other_config(place, golden):
    """A checkpoint of another run in this one's folder: the fields that differ are named."""
    for number, (change, field) in enumerate(
        [
            (("--model.width", "64", "--model.head-dim", "16"), "model.width"),
            (("--model.vocab", "128"), "model.vocab"),
            (("--optimizer.lr", "0.1"), "optimizer.lr"),
            ((), "optimizer.is"),
            (("--model.tied",), "model.tied"),
        ]
    ):
        short = ("--steps", "4", "--eval-every", "0")
        (place.folder / "lion.py").write_text(SYNTHETIC.replace("adamw", "lion").replace("AdamW", "Lion"))
        _, experiment, *options = train(f"K6_{number}_other", *short, *change)
        other = place.run("train", experiment if change else "lion.py", *options)
        assert (other.code, other.err) == (0, "")
        mine = place.run(*train(f"K6_{number}", *short))
        assert mine.code == 0
        folder = place.runs / f"K6_{number}"
        (folder / "events.jsonl").unlink()
        shutil.rmtree(folder / "checkpoints")
        shutil.copytree(place.runs / f"K6_{number}_other" / "checkpoints", folder / "checkpoints")
        before = content(folder / "checkpoints")
        refused = place.run(*train(f"K6_{number}", *short))
        assert refused.code == 65 and refused.err.count("\n") == 1, refused
        assert "another config" in refused.err and field in refused.err
        assert content(folder / "checkpoints") == before


def older(place, golden):
    """A checkpoint as an older version wrote it, before steps were watched; and one from before manifests."""
    shutil.copytree(STORED / "older_run", place.runs / "older")
    shutil.copy(STORED / "older.py", place.folder)
    then = losses(place.runs / "older")
    assert len(then) == 8
    done = place.run("train", "older.py", "--processes.devices", "1")
    assert (done.code, done.err) == (0, "") and "Continuing runs/older from step 4." in done.out
    np.testing.assert_allclose(losses(place.runs / "older"), then, rtol=1e-5)  # as the older version went on from there

    folder = unfinished(golden, "K7")
    for step in (20, 24):
        (folder / "checkpoints" / str(step) / "MANIFEST.json").unlink()
        (folder / "checkpoints" / str(step) / "VERIFIED").unlink()
    before = content(folder / "checkpoints")
    refused = place.run(*train("K7"))
    assert refused.code == 65 and refused.err.count("\n") == 1 and "--trust 24" in refused.err
    assert content(folder / "checkpoints") == before
    trusted = place.run("checkpoints", "K7", "--trust", "20")
    assert trusted.code == 65 and "20" in trusted.out  # the other one is still none
    done = place.run(*train("K7"))
    assert (done.code, done.err) == (0, "") and "Continuing runs/K7 from step 20." in done.out
    same(folder, golden)


ROWS = {
    "K1 a flipped bit in every file": flipped,
    "K2 every file truncated": cut_short,
    "K3 every file removed": removed,
    "K4 all steps corrupt": all_bad,
    "K5 foreign entries beside the steps": foreign,
    "K6 a checkpoint of another config": other_config,
    "K7 a checkpoint of an older format": older,
}


@pytest.mark.parametrize("row", rows(ROWS, fast=("K1",)))
def test_a_checkpoint_that_is_not_what_was_written_is_never_trained_on(row, outcome):
    outcome(row)
