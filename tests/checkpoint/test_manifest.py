"""A checkpoint that is not, to the last byte, what was written is never taken; what is near it is never touched."""

import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.checkpoint import manifest
from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.checkpoint.folder import prune, steps
from llmjax.checkpoint.retention import Retention
from llmjax.errors import DATA, IO, Refused

FACTS = {"tokens": 80, "mesh": {"data": 1}, "loss": 2.5}


def state(step: int) -> dict[str, jax.Array]:
    return {"w": jax.random.normal(jax.random.key(step), (40, 50)), "step": jnp.asarray(step)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with checkpoints 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("written")
    with Checkpoints(folder, Retention(last=3)) as checkpoints:
        for step in (4, 8, 12):
            checkpoints.save(step, state(step), FACTS)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy of it, to be harmed."""
    shutil.copytree(written, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def files(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def newest(folder) -> tuple[int | None, list[str]]:
    """The step that verifies, and what was said."""
    said = []
    with Checkpoints(folder, say=said.append) as checkpoints:
        return checkpoints.newest_verified(), said


def test_a_whole_checkpoint_is_taken_in_silence_and_has_its_facts(written):
    assert newest(written) == (12, [])
    with Checkpoints(written) as checkpoints:
        assert checkpoints.facts(8) == FACTS
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(8))
        np.testing.assert_array_equal(checkpoints.restore(8, abstract)["w"], state(8)["w"])


def test_every_flipped_bit_is_found_in_any_file(folder):
    random, step, found = np.random.default_rng(0), folder / "12", 0
    paths = [path for path in files(step) if path.stat().st_size]
    assert {"MANIFEST.json", "_METADATA", "manifest.ocdbt", "commit_success.txt"} <= {path.name for path in paths}
    tried = 40 * len(paths)
    assert tried >= 400
    for number in range(tried):
        path = paths[number % len(paths)]
        data = path.read_bytes()
        harmed = bytearray(data)
        harmed[random.integers(len(data))] ^= 1 << random.integers(8)
        path.write_bytes(harmed)
        reason = manifest.damage(step)
        found += reason is not None and path.name in reason
        path.write_bytes(data)
    assert found == tried
    assert manifest.damage(step) is None


@pytest.mark.parametrize("left", [lambda size: 0, lambda size: size // 2, lambda size: size - 1])
def test_every_truncated_file_is_found(folder, left):
    for path in (path for path in files(folder / "12") if path.stat().st_size):
        data = path.read_bytes()
        os.truncate(path, left(len(data)))
        assert path.name in manifest.damage(folder / "12", content=path.name == "MANIFEST.json")
        path.write_bytes(data)


def test_every_missing_file_is_found(folder):
    for path in (path for path in files(folder / "12") if path.name != "VERIFIED"):
        data = path.read_bytes()
        path.unlink()
        assert path.name in manifest.damage(folder / "12")
        path.write_bytes(data)
    (folder / "12" / "VERIFIED").unlink()  # says only when it was read back
    assert manifest.damage(folder / "12") is None and manifest.verified(folder / "12") is None


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("state/array_metadatas/process_7", "state/array_metadatas/process_7 was not written with it"),
        ("more", "more was not written with it"),
        (".DS_Store", None),
    ],
)
def test_a_file_more_is_found_unless_it_is_hidden(folder, place, reason):
    (folder / "12" / place).write_text("{}")
    assert manifest.damage(folder / "12") == reason


def test_a_symbolic_link_in_a_checkpoint_is_not_followed(folder):
    path = folder / "12" / "state" / "manifest.ocdbt"
    path.rename(folder / "same_bytes")
    path.symlink_to(folder / "same_bytes")
    assert manifest.damage(folder / "12") == "state/manifest.ocdbt is a symbolic link"
    (folder / "8" / "MANIFEST.json").rename(folder / "manifest")
    (folder / "8" / "MANIFEST.json").symlink_to(folder / "manifest")
    assert "MANIFEST.json cannot be read" in manifest.damage(folder / "8")


@pytest.mark.parametrize("name", ["../8/commit_success.txt", "/etc/hostname", "state/../commit_success.txt", "."])
def test_a_name_that_leads_out_of_the_folder_is_refused_and_not_opened(folder, name):
    found = manifest.read(folder / "12")
    harmed = manifest.Manifest(found.files | {name: (1, "0" * 64)}, found.facts, found.written)
    (folder / "12" / "MANIFEST.json").write_bytes(manifest._text(harmed))  # with a sha256 that is right
    assert manifest.damage(folder / "12") == f"MANIFEST.json names {name!r}, which does not lie in its folder"


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, '{"files": {"a": 1}}', "\x80"])
def test_a_torn_or_foreign_manifest_is_none(folder, text):
    (folder / "12" / "MANIFEST.json").write_bytes(text.encode("latin-1"))
    assert manifest.damage(folder / "12") == "MANIFEST.json is torn or damaged"


def test_the_step_before_is_taken_and_what_was_passed_over_is_said(folder):
    (folder / "8" / "MANIFEST.json").unlink()  # as a step of an older version has none
    data = max((folder / "12" / "state" / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)
    harmed = bytearray(data.read_bytes())
    harmed[500] ^= 1
    data.write_bytes(harmed)
    before = {path: path.read_bytes() for path in files(folder)}
    step, said = newest(folder)
    assert step == 4 and said == [
        f"Passed over checkpoint {folder}/12: {data.relative_to(folder / '12')} holds other bytes than were written.",
        f"Passed over checkpoint {folder}/8: it has no MANIFEST.json.",
    ]
    assert {path: path.read_bytes() for path in files(folder)} == before


def test_where_no_step_verifies_the_run_is_refused_with_every_reason_and_the_remedy(folder):
    for step in (4, 8, 12):
        (folder / str(step) / "state" / "_METADATA").unlink()
    with pytest.raises(Refused, match=r"12: state/_METADATA is missing; 8: .*; 4: .* bring one back") as refused:
        newest(folder)
    assert refused.value.code == DATA and str(folder) in str(refused.value) and "--trust" not in str(refused.value)


def test_a_checkpoint_of_an_older_version_is_taken_once_a_person_says_so(folder):
    for step in (4, 8, 12):
        (folder / str(step) / "MANIFEST.json").unlink()
    with pytest.raises(Refused, match=r"llmjax checkpoints .* --trust 12"):
        newest(folder)
    with Checkpoints(folder) as checkpoints:
        checkpoints.trust(12)
        assert checkpoints.facts(12) == FACTS
    assert newest(folder) == (12, [])


def test_foreign_entries_are_named_and_neither_followed_nor_deleted(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(folder / "12", tmp_path / "elsewhere" / "12")
    (folder / "99").mkdir()
    (folder / "98").symlink_to(tmp_path / "elsewhere" / "12")
    (folder / "97").write_text("a file")
    (folder / "012").mkdir()
    (folder / "..notes").mkdir()
    (folder / "16.unsealed").mkdir()  # of a killed process, or of one at work
    step, said = newest(folder)
    assert step == 12 and said == [
        f"Ignored {folder}/..notes: a folder whose name is no step.",
        f"Ignored {folder}/012: a folder whose name is no step.",
        f"Ignored {folder}/97: a file.",
        f"Ignored {folder}/98: a symbolic link, which is not followed.",
        f"Ignored {folder}/99: an empty folder.",
    ]
    with Checkpoints(folder, Retention(last=1)) as checkpoints:
        checkpoints.save(100, state(100), FACTS)
    assert {path.name for path in folder.iterdir()} == {"..notes", "012", "97", "98", "99", "100"}
    assert len(files(tmp_path / "elsewhere")) == len(files(folder / "100"))


@pytest.mark.parametrize("kind", ["a file", "a symbolic link"])
def test_what_is_in_the_place_of_a_step_is_not_replaced_by_it(tmp_path, kind):
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "7").touch() if kind == "a file" else (folder / "7").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match=f"checkpoint 7 could not be written .*{kind}.* is in its place") as refused:  # noqa: SIM117
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(7, state(7), FACTS)
    assert refused.value.code == IO and (folder / "7").exists() and not list((tmp_path / "elsewhere").iterdir())


def test_a_checkpoint_that_was_passed_over_is_written_anew(folder):
    (folder / "12" / "commit_success.txt").write_text("harmed")
    with Checkpoints(folder, say=lambda line: None) as checkpoints:
        assert checkpoints.newest_verified() == 8
        assert checkpoints.has(8) and not checkpoints.has(12)
        checkpoints.save(12, state(12), FACTS)
        assert checkpoints.has(12)
    assert newest(folder) == (12, []) and checkpoints.steps() == [8, 12]


def test_a_step_has_no_name_before_it_has_a_manifest_and_hashing_holds_up_no_step(tmp_path, monkeypatch):
    hashing, go_on, threads, digest = threading.Event(), threading.Event(), [], manifest._sha256

    def held(path, **how):
        threads.append(threading.current_thread())
        hashing.set()
        assert go_on.wait(60)
        return digest(path, **how)

    monkeypatch.setattr(manifest, "_sha256", held)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), FACTS)
        assert hashing.wait(60)  # this thread, which trains, goes on meanwhile
        assert checkpoints.steps() == [] and (tmp_path / "1.unsealed").is_dir()
        go_on.set()
        checkpoints.wait()
        assert checkpoints.steps() == [1] and manifest.verified(tmp_path / "1")
    assert threading.current_thread() not in threads


def test_a_checkpoint_that_reads_back_differently_is_said_at_once_and_not_counted(tmp_path, monkeypatch):
    write, said = manifest.write, []

    def harmed(folder, facts):
        write(folder, facts)
        if folder.name.startswith("3."):
            (folder / "commit_success.txt").write_text("harmed")

    with Checkpoints(tmp_path, Retention(last=2), said.append) as checkpoints:
        monkeypatch.setattr(manifest, "write", harmed)
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), FACTS)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2, 3] and len(said) == 1 and "3 is not what was written" in said[0]
        checkpoints.save(4, state(4), FACTS)
    assert checkpoints.steps() == [2, 4]


def test_a_manifest_that_cannot_be_written_is_an_io_error_and_leaves_no_step(tmp_path, monkeypatch):
    def full(folder, facts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write", full)
    with pytest.raises(Refused, match=r"checkpoint 1 could not be written .*No space left") as refused:  # noqa: SIM117
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state(1), FACTS)
    assert refused.value.code == IO and checkpoints.steps() == []


def test_retention_keeps_the_newest_the_regular_the_best_and_the_newest_verified():
    losses = dict(enumerate([9, 8, None, 2, 3, float("nan"), 5, 6, 7, 8], 1))
    losses = {10 * step: loss for step, loss in losses.items()}
    assert Retention(2).kept(losses, set()) == {90, 100}
    assert Retention(1, every=40).kept(losses, set()) == {40, 80, 100}
    assert Retention(1, best=2).kept(losses, set()) == {40, 50, 100}
    assert Retention(1, best=99).kept(losses, set()) == set(losses) - {30, 60}
    assert Retention(1).kept(losses, {20, 30}) == {30, 100}
    assert Retention(1).kept(losses, {20, 100, 200}) == {100}
    assert Retention(3).kept({}, set()) == set()


def test_the_checkpoints_that_retention_wants_are_on_disk_and_a_step_without_a_manifest_is_left_alone(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "of an older version").touch()
    with Checkpoints(tmp_path, Retention(last=1, every=30, best=1)) as checkpoints:
        for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 2.6), (50, None)):
            checkpoints.save(step, state(step), {"eval_loss": loss})
    assert checkpoints.steps() == [1, 20, 30, 50]


def test_the_newest_verified_stays_when_the_ones_after_it_were_never_read_back(folder):
    for step in (8, 12):
        (folder / str(step) / "VERIFIED").unlink()
    prune(folder, 12, Retention(last=1), set())
    assert steps(folder) == [4, 12]


def test_a_manifest_says_size_and_sha256_of_every_file(written):
    content = json.loads((written / "12" / "MANIFEST.json").read_text())
    names = {str(path.relative_to(written / "12")) for path in files(written / "12")} - {"MANIFEST.json", "VERIFIED"}
    assert set(content["files"]) == names and content["facts"] == FACTS and content["format"] == 1


def test_many_may_read_back_at_once(written):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: manifest.damage(written / "12", threads=3), range(16))) == {None}


KILLED = """
import os, shutil, signal, sys
import jax.numpy as jnp
from llmjax.checkpoint import manifest
from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.checkpoint.retention import Retention
folder, where = sys.argv[1:]
def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
def armed():
    if where == "before the manifest":
        manifest.write = killed
    if where == "in the manifest":
        os.replace = manifest.Path.replace = killed
    if where == "after the manifest":
        manifest.Path.rename = killed
    if where == "after the name":
        manifest.damage = killed
    if where == "before the pruning":
        manifest.verified = killed
    if where == "in the pruning":
        shutil.rmtree = lambda path, **how: (path / "MANIFEST.json").unlink() or killed() if path.exists() else None
with Checkpoints(folder, Retention(last=2)) as checkpoints:
    for step in (1, 2, 3):
        if step == 3:
            checkpoints.wait()
            armed()
        checkpoints.save(step, {"w": jnp.full(1000, step)}, {"step": step})
"""


@pytest.mark.parametrize(
    ("where", "names", "step"),
    [
        ("before the manifest", {"1", "2", "3.unsealed"}, 2),
        ("in the manifest", {"1", "2", "3.unsealed"}, 2),
        ("after the manifest", {"1", "2", "3.unsealed"}, 2),
        ("after the name", {"1", "2", "3"}, 3),
        ("before the pruning", {"1", "2", "3"}, 3),
        ("in the pruning", {"1.dropped", "2", "3"}, 3),
    ],
)
def test_a_kill_at_any_point_of_a_save_leaves_the_step_whole_or_without_a_name(tmp_path, where, names, step):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), where], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == names
    assert newest(tmp_path) == (step, [])
    with Checkpoints(tmp_path, Retention(last=2)) as checkpoints:
        checkpoints.save(4, state(4), FACTS)
    assert {path.name for path in tmp_path.iterdir()} == {str(step), "4"} and newest(tmp_path) == (4, [])
