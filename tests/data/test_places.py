"""Sources elsewhere give the documents, the names and the bytes of local ones."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from llmjax.data import places, shards
from llmjax.data.build import Build, build
from llmjax.errors import Refused

TEXTS = [f"Text {n}: " + "ünï line\n" * (n % 7) for n in range(100)]
LINES = "".join(json.dumps(dict(text=text)) + "\n" for text in TEXTS).encode()


def made(out, *source, workers=1, **options):
    return build(Build(tuple(map(str, source)), **(dict(heldout=0.1) | options)), out, workers, lambda _: None)


def tokens(store):
    return [shards.take(store, split, 0, int(store.first[split][-1])).tolist() for split in shards.SPLITS]


@pytest.fixture
def folder(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    root = tmp_path / "source"
    (root / "sub").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.txt").write_text("hidden")
    (root / "a.txt").write_text("a text\n" * 50)
    (root / "sub" / "b.jsonl").write_bytes(LINES)
    (root / "sub" / "c.jsonl.gz").write_bytes(gzip.compress(LINES))
    with pa.CompressedOutputStream(str(root / "d.jsonl.zst"), "zstd") as file:
        file.write(LINES)
    table = pa.table({"text": TEXTS})
    pyarrow.parquet.write_table(table, root / "e.parquet", row_group_size=30)
    with pa.ipc.new_file(str(root / "f.arrow"), table.schema) as file:
        file.write_table(table, 50)
    return root


def test_a_folder_by_its_url_gives_the_bytes_of_the_local_one_in_any_process(folder, tmp_path):
    here, there = made(tmp_path / "here", folder), made(tmp_path / "there", f"file://{folder}", workers=2)
    assert there.record["fingerprint"] == here.record["fingerprint"] and tokens(there) == tokens(here)
    assert there.record["asked"]["sources"][0]["names"] == here.record["asked"]["sources"][0]["names"]


def test_what_lies_in_no_file_system_of_this_machine_is_read_the_same(folder, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe(f"/bucket/{path.relative_to(folder).as_posix()}", path.read_bytes())
    try:
        store = made(tmp_path / "there", "memory://bucket")
        assert tokens(store) == tokens(made(tmp_path / "here", folder))
        one = made(tmp_path / "one", "memory://bucket/sub/b.jsonl", only=(".txt",))  # a file is taken as it is
        assert tokens(one) == tokens(made(tmp_path / "one_here", folder / "sub" / "b.jsonl"))
        memory.pipe("/bucket/t.bin", np.arange(8, dtype="<u2").tobytes())
        with pytest.raises(Refused, match=r"memory://.*t\.bin.*copy it"):
            made(tmp_path / "bin", "memory://bucket", only=(".bin",))
        with pytest.raises(Refused, match="does not exist") as refused:
            made(tmp_path / "none", "memory://nowhere")
        assert refused.value.code == 65
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_remote_file_that_changed_is_another(tmp_path):
    pytest.importorskip("fsspec")
    (tmp_path / "a.txt").write_text("one")
    first = places.files(f"file://{tmp_path}/a.txt")
    assert [file.name for file in first] == ["a.txt"] and first == places.files(f"file://{tmp_path}/a.txt")
    (tmp_path / "a.txt").write_text("two")
    assert places.files(f"file://{tmp_path}/a.txt") != first


def test_a_data_set_of_the_hub_is_read_from_its_arrow_files(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(LINES)
    (tmp_path / "set" / "test.jsonl").write_bytes(LINES[: LINES.index(b"\n") + 1])
    store = made(tmp_path / "out", f"hf://{tmp_path}/set", heldout=0.0)
    local = made(tmp_path / "local", tmp_path / "set" / "train.jsonl", heldout=0.0)
    assert tokens(store) == tokens(local) and store.record["train"]["documents"] == len(TEXTS)
    assert store.record["asked"]["sources"][0]["path"] == f"hf://{tmp_path}/set"
    split = made(tmp_path / "split", f"hf://{tmp_path}/set:test", heldout=0.0)
    assert split.record["train"]["documents"] == 1
    for name, said in ((f"{tmp_path}/set:none", "cannot be read"), (f"{tmp_path}/set:train[:5]", "whole split")):
        with pytest.raises(Refused, match=said) as refused:
            made(tmp_path / "bad", f"hf://{name}")
        assert refused.value.code == 65
    with pytest.raises(Refused, match=r"cannot be read .*words"):
        made(tmp_path / "field", f"hf://{tmp_path}/set", field="words")


@pytest.mark.parametrize(
    ("source", "module", "said"), [("hf://x/y", "datasets", r"llmjax\[hub\]"), ("s3://x", "s3fs", "s3fs")]
)
def test_a_library_that_is_not_there_is_named(tmp_path, monkeypatch, source, module, said):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Refused, match=said) as refused:
        made(tmp_path / "out", source)
    assert refused.value.code == 2


def test_a_store_is_local(tmp_path):
    from llmjax.commands.data import Options, Stats, data, stats
    from llmjax.data.stored import Store

    (tmp_path / "a.txt").write_text("text")
    for call in (
        lambda: data(Options("gs://x/store", Build((str(tmp_path / "a.txt"),)))),
        lambda: stats(Stats("gs://x/store")),
        lambda: Store("gs://x/store").open(8, tmp_path),
    ):
        with pytest.raises(Refused, match="gs://x/store' is not a local path") as refused:
            call()
        assert refused.value.code == 2
    assert not Path("gs:").exists()
