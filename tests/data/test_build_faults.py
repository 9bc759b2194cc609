"""A build that meets a full disk, a huge document, other encodings or what cannot be read loses nothing it has."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tracemalloc

import pytest

from llmjax import reading
from llmjax.data import encode, records, shards
from llmjax.data.build import Build, build
from llmjax.data.quality import Quality
from llmjax.errors import Refused

TEXTS = [f"Text {n}: " + "ünï line\n" * (n % 7) for n in range(300)]


def made(out, *source, workers=1, **options):
    options = dict(heldout=0.0, shard=1) | options
    return build(Build(tuple(map(str, source)), **options), out, workers, lambda _: None)


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A file of several units, and the store that an unbroken build makes of it."""
    root = tmp_path_factory.mktemp("faults")
    lines = "".join(json.dumps(dict(text=text * 40)) + "\n" for text in TEXTS)
    (root / "a.jsonl").write_text(lines * 12)
    made(root / "whole", root / "a.jsonl", quality=Quality(shortest=1))
    return root


@contextlib.contextmanager
def small_disk(folder, size):
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root alone")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_is_full_ends_the_build_and_with_room_it_goes_on_to_the_same_bytes(source, tmp_path, workers):
    with small_disk(tmp_path / "disk", "32m") as disk:
        made(disk / "before", source / "a.jsonl", heldout=0.5)
        before = content(disk / "before")
        free = shutil.disk_usage(disk).free
        with open(disk / "filler", "wb") as file:
            file.write(bytes(free - 5_000_000))
        for _ in range(2):  # and again while it is full
            with pytest.raises(Refused, match=r"out.*No space left on device.*run the same command") as refused:
                made(disk / "out", source / "a.jsonl", workers=workers, quality=Quality(shortest=1))
            assert refused.value.code == 74 and not (disk / "out").exists()
        done = len(list((disk / "out.unfinished" / "parts").glob("*.json")))
        assert done and content(disk / "before") == before
        (disk / "filler").unlink()
        made(disk / "out", source / "a.jsonl", workers=workers, quality=Quality(shortest=1))
        assert content(disk / "out") == content(source / "whole") and content(disk / "before") == before


def test_a_file_that_may_not_grow_ends_the_build_with_74_and_one_sentence(source, tmp_path):
    words = ["data", "build", str(tmp_path / "out"), "--source", str(source / "a.jsonl"), "--shard", "1"]
    words += ["--heldout", "0", "--shortest", "1", "--workers", "1"]
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1)); "
    script += "from llmjax.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", script, *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 74 and ended.stderr.count("\n") == 1 and "File too large" in ended.stderr
    assert made(tmp_path / "out", source / "a.jsonl", quality=Quality(shortest=1)).record["train"]["documents"] == 3600
    assert content(tmp_path / "out") == content(source / "whole")


@pytest.mark.parametrize(("line", "lines"), [("line {0} of {1},\n", 8_000), ("x", 400_000)])
def test_a_huge_document_takes_no_more_memory_than_a_part_of_it(tmp_path, monkeypatch, line, lines):
    monkeypatch.setattr(records, "PIECE", 1 << 14)
    monkeypatch.setattr(encode, "_AT_ONCE", 1 << 14)
    monkeypatch.setattr(reading, "TOKENIZER", 1 << 20)  # as much is set aside where a file is read
    monkeypatch.setattr(reading, "RECORD", 1 << 20)
    peaks = {}
    for name, count in (("warm", lines), ("small", lines), ("large", 10 * lines)):
        (tmp_path / f"{name}.txt").write_text("".join(line.format(n % 50, n * 7 % 31) for n in range(count)))
        tracemalloc.start()
        store = made(tmp_path / name, tmp_path / f"{name}.txt", quality=Quality(duplicates="near"))
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert store.record["train"]["documents"] == 1
    assert peaks["large"] < peaks["small"] + 1_000_000


def test_a_file_in_another_encoding_is_bad_and_named_and_the_others_are_kept(tmp_path):
    root = tmp_path / "texts"
    root.mkdir()
    (root / "a.txt").write_text("ascii and ünïcode")
    (root / "b.txt").write_bytes("latin é".encode("latin-1"))
    (root / "c.txt").write_bytes("sixteen bits".encode("utf-16"))
    (root / "d.txt").write_bytes("\ufeffwith a mark".encode())
    with pytest.raises(Refused, match=r"b\.txt' has a bad record, b\.txt \(not UTF-8.*--bad skip") as refused:
        made(tmp_path / "out", root)
    assert refused.value.code == 65
    for asked in (Quality(), Quality(duplicates="exact")):
        store = made(tmp_path / f"skipped-{asked.duplicates}", root, bad="skip", quality=asked)
        assert store.record["train"]["documents"] == 2 and sum(store.record["bad"].values()) == 2
        assert [line.split(":")[0] for line in store.record["bad_sample"]] == ["b.txt", "c.txt"]


def test_what_cannot_be_read_is_named(tmp_path):
    root = tmp_path / "texts"
    root.mkdir()
    (root / "a.txt").write_text("text")
    (root / "b.txt").symlink_to("nowhere")
    with pytest.raises(Refused, match=r"b\.txt \(cannot be read \(No such file or directory\)\)") as refused:
        made(tmp_path / "out", root)
    assert refused.value.code == 65
    assert made(tmp_path / "skipped", root, bad="skip").record["train"]["documents"] == 1
    (root / "b.txt").unlink()
    (root / "b.parquet").write_text("no parquet")
    pytest.importorskip("pyarrow")
    with pytest.raises(Refused, match=r"b\.parquet.*cannot be read") as refused:
        made(tmp_path / "parquet", root)
    assert refused.value.code == 65


def test_documents_of_no_length_are_counted_and_take_no_token(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "a"}\n{"text": ""}\n')
    for asked in (Quality(), Quality(duplicates="near", shortest=1)):
        out = tmp_path / f"out-{asked.duplicates}"
        store = made(out, tmp_path / "empty.txt", tmp_path / "a.jsonl", quality=asked)
        assert store.record["empty"] == 3 and store.record["train"] == dict(documents=1, bytes=1, tokens=2)
        assert shards.take(store, "train", 0, 9).tolist() == [256, ord("a")]
    with pytest.raises(Refused, match="no text to train on"):
        made(tmp_path / "none", tmp_path / "empty.txt")
