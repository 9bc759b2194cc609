"""A build gives the same bytes however it comes about, and never leaves anything out in silence."""

import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from llmjax.data import records, shards
from llmjax.data.build import Build, build
from llmjax.errors import Refused

TEXTS = [f"Text {n}: " + "ünï line\n" * (n % 7) for n in range(200)]


def lines(texts=TEXTS):
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()


def made(out, *source, workers=1, **options):
    options = {"heldout": 0.0, "shard": 1} | options
    return build(Build(source=tuple(map(str, source)), **options), out, workers, lambda _: None)


def tokens(store, split="train"):
    return shards.take(store, split, 0, int(store.first[split][-1]))


def expected(texts=TEXTS):
    return [token for text in texts if text for token in (256, *text.encode())]


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_format_of_the_same_texts_gives_the_same_tokens(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
    (tmp_path / "a.jsonl").write_bytes(lines())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines()))
    with pa.CompressedOutputStream(str(tmp_path / "c.jsonl.zst"), "zstd") as file:
        file.write(lines())
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=30)
    with pa.ipc.new_stream(str(tmp_path / "e.arrow"), table.schema) as file:
        file.write_table(table, 50)
    with pa.ipc.new_file(str(tmp_path / "f.arrow"), table.schema) as file:
        file.write_table(table, 50)
    for path in sorted(tmp_path.iterdir()):
        store = made(tmp_path / f"store-{path.name}", path)
        assert tokens(store).tolist() == expected(), path.name
        assert store.record["train"] == dict(
            documents=len(TEXTS), bytes=sum(len(t.encode()) for t in TEXTS), tokens=len(expected())
        )


def test_lines_that_meet_a_cut_are_read_once(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines())
    for size in (1, 7, 100, 5000):
        cuts = [*range(0, len(lines()), size), len(lines())]
        found = [
            piece.text
            for low, high in itertools.pairwise(cuts)
            for piece in records.jsonl("a", str(tmp_path / "a.jsonl"), "text", low, high)
        ]
        assert found == TEXTS


def test_a_folder_of_texts_is_a_document_each_and_suffixes_choose(tmp_path):
    root = tmp_path / "code"
    (root / "sub").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("no")
    for name, text in {"a.py": "x = 1\n", "sub/b.py": "", "sub/c.py": "y = 2\n", "z.png": "png"}.items():
        (root / name).write_text(text)
    store = made(tmp_path / "out", root, only=(".py",))
    assert tokens(store).tolist() == expected(["x = 1\n", "y = 2\n"])
    assert store.record["empty"] == 1
    assert shards.starts(store, "train", 0, 14).tolist() == [0, 7]


def test_a_text_longer_than_any_piece_is_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PIECE", 1000)
    text = "".join(f"ünï {n}\n" for n in range(3000))
    (tmp_path / "long.txt").write_text(text)
    assert len(list(records.text("long", str(tmp_path / "long.txt")))) > 5
    (tmp_path / "long.jsonl").write_bytes(lines([text]))
    assert len(list(records.jsonl("long", str(tmp_path / "long.jsonl"), "text", 0, 1))) > 5
    for name in ("long.txt", "long.jsonl"):
        store = made(tmp_path / f"out-{name}", tmp_path / name)
        assert tokens(store).tolist() == expected([text])
        assert store.record["train"]["documents"] == 1


def test_heldout_documents_are_drawn_by_name_and_no_text_is_lost(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines())
    store = made(tmp_path / "out", tmp_path / "a.jsonl", heldout=0.2)
    counts = [store.record[split]["documents"] for split in shards.SPLITS]
    assert sum(counts) == len(TEXTS) and 20 < counts[1] < 60
    (tmp_path / "b.jsonl").write_bytes(lines())
    apart = made(tmp_path / "apart", tmp_path / "a.jsonl", heldout_source=(str(tmp_path / "b.jsonl"),))
    assert tokens(apart).tolist() == tokens(apart, "heldout").tolist() == expected()


BAD = [b"{", b'{"no": 1}', b'{"text": 7}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"[1]"]


def test_bad_records_end_the_build_or_are_counted_and_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines()[:-1] + b"\n" + b"\n".join(BAD) + b'\n\n{"text": ""}\n')
    with pytest.raises(Refused, match=r"a\.jsonl@\d+ \(not JSON\).*--bad skip") as refused:
        made(tmp_path / "out", path)
    assert refused.value.code == 65 and not (tmp_path / "out").exists()
    store = made(tmp_path / "skipped", path, bad="skip")
    assert tokens(store).tolist() == expected()
    assert sum(store.record["bad"].values()) == len(BAD) and store.record["empty"] == 1
    assert any(line.endswith("field 'text' is int, not text") for line in store.record["bad_sample"])


def test_a_compressed_file_that_was_cut_short_is_bad_and_what_came_before_is_kept(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines())[:-40])
    with pytest.raises(Refused, match="cannot be read"):
        made(tmp_path / "out", tmp_path / "a.jsonl.gz")
    store = made(tmp_path / "skipped", tmp_path / "a.jsonl.gz", bad="skip")
    assert sum(store.record["bad"].values()) == 1 and store.record["train"]["documents"] > 100


def llm_c(path, ids):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())


def megatron(path, documents, dtype=np.int32):
    flat, lengths = np.concatenate(documents), [len(d) for d in documents]
    path.write_bytes(flat.astype(dtype).tobytes())
    begin = np.cumsum([0, *lengths])
    head = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([4 if dtype == np.int32 else 8])
    counts = np.array([len(documents), len(documents) + 1], "<u8").tobytes()
    parts = np.array(lengths, "<i4"), (begin[:-1] * np.dtype(dtype).itemsize).astype("<i8"), np.arange(len(begin))
    path.with_suffix(".idx").write_bytes(head + counts + b"".join(part.tobytes() for part in parts))


def test_token_files_of_others_are_read_in_place(tmp_path):
    ids = [256, *b"one", 256, *b"two words"]
    np.array(ids, "<u2").tofile(tmp_path / "nano.bin")
    llm_c(tmp_path / "c.bin", ids)
    megatron(tmp_path / "m.bin", [np.array(ids[:4]), np.array(ids[4:])])
    for name in ("nano.bin", "c.bin", "m.bin"):
        store = made(tmp_path / f"store-{name}", tmp_path / name)
        assert tokens(store).tolist() == ids
        assert shards.starts(store, "train", 0, len(ids)).tolist() == [0, 4]
        assert not list((store.folder / "tokens").glob("*.bin"))
    with (tmp_path / "c.bin").open("r+b") as file:
        file.seek(1024 + 2)
        file.write(b"\x07")
    with pytest.raises(Refused, match=r"c\.bin.*other bytes"):
        tokens(shards.open_shards(tmp_path / "store-c.bin"))


def test_a_token_above_the_vocabulary_or_a_false_header_is_refused(tmp_path):
    np.array([1, 2, 300], "<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(Refused, match=r"token 300 at 2, above the tokenizer's 257"):
        made(tmp_path / "out", tmp_path / "a.bin")
    llm_c(tmp_path / "b.bin", [1, 2, 3])
    os.truncate(tmp_path / "b.bin", 1028)
    with pytest.raises(Refused, match=r"b\.bin"):
        made(tmp_path / "out2", tmp_path / "b.bin")


@pytest.mark.parametrize("damage", ["changed", "cut short", "gone"])
@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_a_damaged_shard_is_refused_by_file(tmp_path, damage, kind):
    (tmp_path / "a.jsonl").write_bytes(lines())
    made(tmp_path / "out", tmp_path / "a.jsonl")
    path = tmp_path / "out" / "tokens" / f"000000-train.{kind}"
    if damage == "changed":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 2)
    with pytest.raises(Refused, match=path.name) as refused:
        tokens(shards.open_shards(tmp_path / "out"))
    assert refused.value.code == 65


@pytest.mark.parametrize("name", ["dataset.json", "index.bin"])
def test_a_damaged_record_is_refused_when_opened(tmp_path, name):
    (tmp_path / "a.jsonl").write_bytes(lines())
    made(tmp_path / "out", tmp_path / "a.jsonl")
    data = (tmp_path / "out" / name).read_bytes()
    (tmp_path / "out" / name).write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
    with pytest.raises(Refused, match="damaged"):
        shards.open_shards(tmp_path / "out")


def test_what_is_asked_wrongly_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    cases = [
        (["s3://x/y"], {}, 2, "s3fs"),
        ([tmp_path / "b.txt"], {}, 65, r"did you mean a\.txt"),
        ([tmp_path / "empty"], {}, 65, "without files"),
        ([], {}, 2, "--source"),
        ([tmp_path / "a.txt"], dict(heldout=1.0), 2, "--heldout"),
        ([tmp_path / "a.txt"], dict(shard=0), 2, "--shard"),
        ([tmp_path / "a.txt"], dict(tokenizer=str(tmp_path / "no.json")), 65, r"no\.json"),
    ]
    for source, options, code, said in cases:
        with pytest.raises(Refused, match=said) as refused:
            made(tmp_path / "out", *source, **options)
        assert refused.value.code == code
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "empty"}


def test_a_store_is_never_built_over_and_the_same_build_finds_it(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    first = content(made(tmp_path / "out", tmp_path / "a.txt").folder)
    assert content(made(tmp_path / "out", tmp_path / "a.txt").folder) == first
    with pytest.raises(Refused, match="other sources or options"):
        made(tmp_path / "out", tmp_path / "a.txt", heldout=0.5)
    assert content(tmp_path / "out") == first


def start(out, source, workers):
    words = ["data", "build", str(out), "--source", str(source), "--shard", "1", "--workers", str(workers)]
    return subprocess.Popen(
        [sys.executable, "-m", "llmjax.cli", *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_build_goes_on_and_ends_in_the_same_bytes_as_any_other(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"".join(lines([text * 60 for text in TEXTS]) for _ in range(10)))
    killed = start(tmp_path / "killed", source, 2)
    parts = tmp_path / "killed.unfinished" / "parts"
    until = time.monotonic() + 60
    while not list(parts.glob("*.json")) and time.monotonic() < until:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    left = len(list(parts.glob("*.json")))
    assert not (tmp_path / "killed").exists() and left
    again = start(tmp_path / "killed", source, 2)
    said = again.communicate()[0]
    assert again.returncode == 0 and "are there from before" in said
    made(tmp_path / "whole", source, heldout=0.01)
    assert len(list((tmp_path / "whole" / "tokens").iterdir())) > 4 * left
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert not (tmp_path / "killed.unfinished").exists()


def test_half_of_another_build_is_not_gone_on_with(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines() + b"{\n")
    with pytest.raises(Refused, match="bad record"):
        made(tmp_path / "out", tmp_path / "a.jsonl")
    with pytest.raises(Refused, match="half of a build"):
        made(tmp_path / "out", tmp_path / "a.jsonl", heldout=0.5)


def test_after_a_bad_record_the_build_goes_on_with_skip_and_not_back(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines())
    (tmp_path / "b.jsonl").write_bytes(b"{\n" + lines())
    (tmp_path / "c.jsonl").write_bytes(lines() + b"[]\n")
    source = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for bad in ("fail", "fail"):
        with pytest.raises(Refused, match="bad record"):
            made(tmp_path / "out", *source, bad=bad)
    assert len(list((tmp_path / "out.unfinished" / "parts").glob("*.json"))) == 1
    made(tmp_path / "out", *source, bad="skip")
    made(tmp_path / "whole", *source, bad="skip")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
