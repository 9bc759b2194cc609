"""K1-K7: a checkpoint that is not what was written is never trained on."""

import json
import random
import shutil

import pytest
from matrix import copied, count, rows, same
from place import FOUR, content, flip, metrics

from llmjax.checkpoint.checkpoints import Checkpoints

FLIPS = 24  # of every file


def command(name, *more):
    return ("train", "synthetic.py", "--name", name, *FOUR, *more)


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
    folder = unfinished(golden, f"K_{why}")
    step, tried = folder / "checkpoints" / "24", 0
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for path in files_of(step):
            kept = path.read_bytes()
            for harmed in harm(kept):
                path.unlink() if harmed is None else path.write_bytes(harmed)
                assert checkpoints.verify(24), (path, why)
                assert checkpoints.newest_verified() == 20
                tried += 1
                path.write_bytes(kept)
        assert checkpoints.verify(24) is None
    path = files_of(step)[-1]
    harmed = next(iter(harm(path.read_bytes())))
    path.unlink() if harmed is None else path.write_bytes(harmed)
    done = place.run(*command(folder.name))
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

    tried = every_file(place, golden, harm, "flipped")
    assert tried >= 200
    count("flipped bits detected", tried, tried)


def cut_short(place, golden):
    tried = every_file(place, golden, lambda kept: (kept[:n] for n in (0, len(kept) // 2, len(kept) - 1)), "cut")
    count("truncated files detected", tried, tried)


def removed(place, golden):
    tried = every_file(place, golden, lambda kept: [None], "removed")
    count("missing files detected", tried, tried)


def all_bad(place, golden):
    folder = unfinished(golden, "K4")
    for step in (20, 24):
        flip(files_of(folder / "checkpoints" / str(step))[-1])
    before = content(folder / "checkpoints")
    refused = place.run(*command("K4"))
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
    done = place.run(*command("K5"))
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
            (("--model.tied",), "model.tied"),
        ]
    ):
        short = ("--steps", "4", "--eval-every", "0")
        other = place.run(*command(f"K6_{number}_other", *short, *change))
        assert (other.code, other.err) == (0, "")
        mine = place.run(*command(f"K6_{number}", *short))
        assert mine.code == 0
        folder = place.runs / f"K6_{number}"
        (folder / "events.jsonl").unlink()
        shutil.rmtree(folder / "checkpoints")
        shutil.copytree(place.runs / f"K6_{number}_other" / "checkpoints", folder / "checkpoints")
        before = content(folder / "checkpoints")
        refused = place.run(*command(f"K6_{number}", *short))
        assert refused.code == 65 and refused.err.count("\n") == 1, refused
        assert "another config" in refused.err and field in refused.err
        assert content(folder / "checkpoints") == before


def older(place, golden):
    """A checkpoint as the version without manifests wrote it, and one of the version that watched no steps."""
    folder = unfinished(golden, "K7")
    for step in (20, 24):
        (folder / "checkpoints" / str(step) / "MANIFEST.json").unlink()
        (folder / "checkpoints" / str(step) / "VERIFIED").unlink()
    refused = place.run(*command("K7"))
    assert refused.code == 65 and refused.err.count("\n") == 1 and "--trust 24" in refused.err
    trusted = place.run("checkpoints", "K7", "--trust", "20")
    assert trusted.code in (0, 65) and "20" in trusted.out
    facts = json.loads((folder / "checkpoints" / "20" / "MANIFEST.json").read_text())["facts"]
    assert facts["step"] == 20
    done = place.run(*command("K7"))
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
