"""A store appears whole or not at all, and says where it came from."""

import gzip
import hashlib
import json
import lzma
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from llmjax.data import store
from llmjax.data.corpus import Document, hold_out
from llmjax.data.tokenizer import BPE, Bytes, TokenizerFile
from llmjax.errors import Refused

DOCUMENTS = [Document(f"{i}.py", f"def f_{i}(x):\n    return x + {i}\n" * (i + 1)) for i in range(40)]


def ensure(cache, documents=DOCUMENTS, tokenizer=None, fraction=0.2):
    return store.ensure(documents, tokenizer or BPE(300), fraction, source="here", cache=cache, say=lambda _: None)


def test_tokens_decode_to_the_documents_each_after_an_end_of_text(tmp_path):
    opened = ensure(tmp_path, tokenizer=Bytes())
    for side, documents in zip(("train", "heldout"), hold_out(DOCUMENTS, 0.2), strict=True):
        expected = [t for d in documents for t in (256, *d.text.encode())]
        assert getattr(opened, side)[:].tolist() == expected


def test_record_tells_provenance_sizes_and_hashes(tmp_path):
    opened = ensure(tmp_path)
    record, (train, heldout) = opened.record, hold_out(DOCUMENTS, 0.2)
    assert record["source"] == "here" and record["tokenizer"] == "BPE(vocab=300)"
    for side, documents in (("train", train), ("heldout", heldout)):
        data = [d.text.encode() for d in documents]
        assert record[side] == {
            "documents": len(documents),
            "bytes": sum(map(len, data)),
            "tokens": len(getattr(opened, side)),
        }
        assert record["files"][side] == {
            d.name: hashlib.sha256(b).hexdigest() for d, b in zip(documents, data, strict=True)
        }
    for name in ("train.bin", "heldout.bin", "tokenizer.json"):
        content = (opened.folder / name).read_bytes()
        assert record["sha256"][name] == hashlib.sha256(content).hexdigest()
        assert record["sizes"][name] == len(content)
    assert record["versions"]["tokenizers"] and record["versions"]["python"]
    data = [d.text.encode() for d in heldout]
    bits = 8 / sum(map(len, data))
    assert record["baselines"]["gzip"] == pytest.approx(bits * sum(len(gzip.compress(b, 9)) for b in data))
    assert record["baselines"]["xz"] == pytest.approx(bits * sum(len(lzma.compress(b, preset=9)) for b in data))


def test_the_same_corpus_gives_the_same_bytes_anywhere_and_opens_again(tmp_path):
    first, second = ensure(tmp_path / "a"), ensure(tmp_path / "b")
    assert first.folder.name == second.folder.name
    for name in ("train.bin", "heldout.bin", "tokenizer.json", "dataset.json"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    made = (first.folder / "train.bin").stat().st_mtime_ns
    assert (ensure(tmp_path / "a").folder / "train.bin").stat().st_mtime_ns == made


def test_what_decides_the_content_decides_the_key(tmp_path):
    Bytes().build().save(str(tmp_path / "tokenizer.json"))
    renamed = [Document("other.py", DOCUMENTS[0].text), *DOCUMENTS[1:]]
    changed = [Document(DOCUMENTS[0].name, DOCUMENTS[0].text + " "), *DOCUMENTS[1:]]
    moved = [Document("a", "bc"), Document("d", "e")], [Document("a", "b"), Document("cd", "e")]
    keys = [store.key(d, BPE(300), 0.2) for d in (DOCUMENTS, renamed, changed, DOCUMENTS[1:], *moved)]
    keys += [store.key(DOCUMENTS, t, 0.2) for t in (BPE(301), Bytes(), TokenizerFile(str(tmp_path / "tokenizer.json")))]
    keys += [store.key(DOCUMENTS, BPE(300), 0.3)]
    assert len(set(keys)) == len(keys)


def test_large_vocabularies_are_stored_as_32_bits(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: 70_000 + i for i, word in enumerate(["a", "b", "<eos>"])}
    built = Tokenizer(models.WordLevel(words, unk_token="a"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.save(str(tmp_path / "tokenizer.json"))
    documents = [Document("a.txt", "a b\n" * 20)]
    opened = ensure(tmp_path / "cache", documents, TokenizerFile(str(tmp_path / "tokenizer.json")))
    assert opened.train.dtype == np.uint32 and set(opened.train[:].tolist()) == {70_000, 70_001, 70_002}
    assert ensure(tmp_path / "cache").train.dtype == np.uint16


def test_a_long_document_is_cut_for_encoding_without_a_trace(tmp_path, monkeypatch):
    text = "".join(f"def f_{i}(self):\n\n    x = {i}\n\n\n" for i in range(500))
    documents = [Document("long.py", text)]
    whole = ensure(tmp_path / "whole", documents)
    monkeypatch.setattr(store, "_CHUNK", 1000)
    assert len(list(store._pieces(text))) > 10
    cut = ensure(tmp_path / "cut", documents)
    assert np.array_equal(whole.train, cut.train) and np.array_equal(whole.heldout, cut.heldout)


@pytest.mark.parametrize("name", ["train.bin", "heldout.bin", "tokenizer.json", "dataset.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_store_is_refused_by_file_with_code_65(tmp_path, name, damage):
    path = ensure(tmp_path).folder / name
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(Refused, match=rf"{name}.*delete the folder") as refused:
        ensure(tmp_path)
    assert refused.value.code == 65


def test_a_cache_that_cannot_be_written_is_refused_with_code_74(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="file") as refused:
        ensure(tmp_path / "file" / "cache")
    assert refused.value.code == 74


def test_a_failed_build_leaves_nothing(tmp_path):
    with pytest.raises(Refused):
        ensure(tmp_path, tokenizer=TokenizerFile(__file__))
    assert list(tmp_path.iterdir()) == []


BUILD = """
import sys
from pathlib import Path
from llmjax.data import store
from llmjax.data.corpus import Document
from llmjax.data.tokenizer import BPE
documents = [Document(f"{i}.py", f"def f_{i}(x):\\n    return x + {i}\\n" * (i + 1)) for i in range(40)]
def say(line):
    print(line, flush=True)
    if "encoding" in line and sys.argv[2] == "wait":
        sys.stdin.read()
print(store.ensure(documents, BPE(300), 0.2, source="here", cache=Path(sys.argv[1]), say=say).folder, flush=True)
"""


def start_build(cache, wait):
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(cache), wait],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_build_leaves_no_store_and_the_next_one_builds_it(tmp_path):
    build = start_build(tmp_path, "wait")
    assert "Tokenizer" in build.stdout.readline() and "encoding" in build.stdout.readline()
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and (left[0] / "tokenizer.json").exists()
    build.send_signal(signal.SIGKILL)
    assert build.wait() == -signal.SIGKILL
    name = store.key(DOCUMENTS, BPE(300), 0.2)
    assert not (tmp_path / name).exists()
    yesterday = time.time() - 2 * 24 * 3600
    os.utime(left[0], (yesterday, yesterday))
    assert ensure(tmp_path).folder == tmp_path / name
    assert [path.name for path in tmp_path.iterdir()] == [name]  # and what the kill left is cleared away in time


def test_builds_at_once_end_in_one_store(tmp_path):
    builds = [start_build(tmp_path, "wait") for _ in range(2)]
    for build in builds:  # both are past the question whether a store is there
        build.stdout.readline(), build.stdout.readline()
    folders = {build.communicate("")[0].strip() for build in builds}
    assert [build.returncode for build in builds] == [0, 0]
    assert folders == {str(tmp_path / store.key(DOCUMENTS, BPE(300), 0.2))}
    assert [str(path) for path in tmp_path.iterdir()] == list(folders)
    assert json.loads((tmp_path / next(iter(folders)) / "dataset.json").read_text())["source"] == "here"
