"""A run trains from a store: rows are windows or whole documents, and what is not the run's store is refused."""

import hashlib
import json

import numpy as np
import pytest

from llmjax.data import packing, shards
from llmjax.data.build import Build, build
from llmjax.data.stored import Store
from llmjax.data.tokenizer import BPE
from llmjax.errors import Refused

LENGTHS = np.random.default_rng(0).geometric(1 / 40, 600) + 1


def text(n):
    return "".join(chr(97 + (n * 7 + i) % 26) for i in range(LENGTHS[n]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store of several shards, of one token per byte."""
    root = tmp_path_factory.mktemp("stored")
    names = []
    for part in range(4):
        path = root / f"{part}.jsonl"
        path.write_text("".join(json.dumps(dict(text=text(n))) + "\n" for n in range(part, 600, 4)))
        names.append(str(path))
    build(Build(source=tuple(names), heldout=0.1), root / "store", 1, lambda _: None)
    return root / "store"


def stream(store, split="train"):
    return shards.take(store, split, 0, int(store.first[split][-1]))


@pytest.mark.parametrize("sequence", [1, 7, 64, 5000])
def test_a_cut_row_is_the_window_at_i_times_t_across_shards(folder, tmp_path, sequence):
    dataset = Store(str(folder)).open(sequence, tmp_path)
    assert dataset.store.record["shards"] == 8
    whole = stream(dataset.store)
    got = dataset.examples("train", np.arange(dataset.size("train") + 1))
    assert got.keys() == {"tokens", "targets", "weights"} and got["tokens"].dtype == np.int32
    size = dataset.size("train")
    assert size == (len(whole) - 1) // sequence
    assert np.array_equal(got["tokens"][:-1].ravel(), whole[: size * sequence])
    assert np.array_equal(got["targets"][:-1].ravel(), whole[1 : size * sequence + 1])
    assert (got["weights"][:-1] == 1).all() and not got["weights"][-1].any()
    with pytest.raises(IndexError):
        dataset.examples("train", np.array([-1]))


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_every_heldout_token_is_a_target_exactly_once(folder, tmp_path, packing):
    dataset = Store(str(folder), packing, segments=True).open(50, tmp_path)
    got = dataset.examples("heldout", np.arange(dataset.size("heldout")))
    counted = got["weights"] == 1
    assert np.array_equal(got["targets"][counted], stream(dataset.store, "heldout")[1:])
    assert counted.sum() == dataset.heldout_tokens
    assert dataset.heldout_bytes == dataset.store.record["heldout"]["bytes"] > 0


def test_segments_of_a_cut_row_change_where_a_document_starts(folder, tmp_path):
    dataset = Store(str(folder), segments=True).open(64, tmp_path)
    got = dataset.examples("train", np.arange(dataset.size("train")))
    begins = np.diff(got["segments"], axis=1) == 1
    assert np.array_equal(begins, got["tokens"][:, 1:] == 256)


@pytest.mark.parametrize("sequence", [16, 64, 1000])
def test_best_fit_rows_hold_every_token_once_and_cut_only_what_is_longer(folder, tmp_path, sequence):
    dataset = Store(str(folder), "best_fit", segments=True).open(sequence, tmp_path)
    got = dataset.examples("train", np.arange(dataset.size("train")))
    found, longer, names = [], 0, ("tokens", "targets", "weights", "segments")
    for tokens, targets, weights, segments in zip(*(got[name] for name in names), strict=True):
        for number in np.unique(segments):
            here = (segments == number) & (weights > 0)
            if not here.any():
                continue
            assert np.array_equal(tokens[here][1:], targets[here][:-1])  # within one document, or end of text
            found.append((tokens[here].tolist(), int(targets[here][-1])))
    whole = stream(dataset.store)
    assert sum(len(tokens) for tokens, _ in found) == len(whole)
    assert got["weights"].sum() == len(whole)
    documents = np.split(whole, np.flatnonzero(whole == 256)[1:])
    expected = []
    for document in documents:
        longer += len(document) > sequence
        for at in range(0, len(document), sequence):
            following = document[at + sequence] if at + sequence < len(document) else 256
            expected.append((document[at : at + sequence].tolist(), int(following)))
    assert sorted(found) == sorted(expected)
    facts = dataset.packed.facts
    assert facts["cut"] == longer / len(documents) and facts["needless"] == 0
    assert facts["padding"] == pytest.approx(1 - len(whole) / got["tokens"].size)


def test_best_fit_pads_little_where_splitting_cuts_many(folder, tmp_path):
    dataset = Store(str(folder), "best_fit").open(256, tmp_path)
    split = packing.report(dataset.store, "train", 256, "split", Store(str(folder)).open(256, tmp_path).size("train"))
    assert dataset.packed.facts["padding"] < 0.01
    assert split["needless"] > 0.1 and dataset.packed.facts["cut"] < 0.01


def test_a_piece_goes_into_the_fullest_row_that_has_room():
    assert packing.best_fit(np.array([6, 4, 5, 3, 2]), 10).tolist() == [0, 0, 1, 1, 1]
    assert packing.best_fit(np.array([7, 6, 3, 4, 10]), 10).tolist() == [1, 2, 1, 2, 0]


def test_packing_in_groups_bounds_memory_and_loses_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_GROUP", 50)
    dataset = Store(str(folder), "best_fit").open(64, tmp_path)
    assert dataset.examples("train", np.arange(dataset.size("train")))["weights"].sum() == len(stream(dataset.store))


def test_one_store_serves_several_lengths_and_a_packing_is_decided_once(folder, tmp_path):
    said = []
    first = {T: Store(str(folder), "best_fit").open(T, tmp_path, said.append) for T in (32, 64)}
    assert "padding" in said[0]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.bin")}
    again = {T: Store(str(folder), "best_fit").open(T, tmp_path) for T in (32, 64)}
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.bin")} and len(times) == 4
    assert {T: d.fingerprint for T, d in first.items()} == {T: d.fingerprint for T, d in again.items()}


def test_the_fingerprint_follows_what_a_row_is(folder, tmp_path):
    configs = [Store(str(folder), packing, segments) for packing in ("split", "best_fit") for segments in (False, True)]
    assert len({config.open(T, tmp_path).fingerprint for config in configs for T in (32, 33)}) == 8


def test_opening_does_not_touch_a_token(folder, tmp_path):
    held = folder / "tokens"
    held.rename(folder / "away")
    try:
        dataset = Store(str(folder)).open(64, tmp_path)
        assert dataset.size("train") > 10
        with pytest.raises(Refused, match=r"000000-train\.bin"):
            dataset.examples("train", np.array([0]))
    finally:
        (folder / "away").rename(held)


def test_a_store_of_another_tokenizer_is_refused(folder, tmp_path):
    BPE(300).build([text(n) for n in range(600)]).save(str(tmp_path / "other.json"))
    with pytest.raises(Refused, match=r"data\.tokenizer.*other\.json") as refused:
        Store(str(folder), tokenizer=str(tmp_path / "other.json")).open(64, tmp_path)
    assert refused.value.code == 65
    (tmp_path / "same.json").write_text(json.dumps(json.loads((folder / "tokenizer.json").read_text())))
    Store(str(folder), tokenizer=str(tmp_path / "same.json")).open(64, tmp_path)


@pytest.mark.parametrize(
    ("config", "sequence", "code", "said"),
    [
        (Store(), 8, 2, r"data\.path"),
        (Store("nowhere"), 8, 65, "nowhere"),
        (Store("x", packing="tight"), 8, 2, r"data\.packing"),
        (Store("x"), 0, 2, "sequence"),
    ],
)
def test_bad_fields_are_refused_by_name(tmp_path, config, sequence, code, said):
    with pytest.raises(Refused, match=said) as refused:
        config.open(sequence, tmp_path)
    assert refused.value.code == code


def test_a_store_with_nothing_held_out_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 50)
    build(Build(source=(str(tmp_path / "a.txt"),), heldout=0.0), tmp_path / "store", 1, lambda _: None)
    with pytest.raises(Refused, match="--heldout"):
        Store(str(tmp_path / "store")).open(8, tmp_path)


def test_a_store_of_terabytes_opens_by_its_index_and_is_read_anywhere(folder, tmp_path):
    count, real = 20_000, shards.open_shards(folder)
    entry = real.entries["train"][:1].copy()
    entries = np.repeat(entry, count)
    entries["unit"], entries["tokens"] = np.arange(1, count + 1), 1 << 26  # 2.7 TB of tokens, but for the last shard
    entries[-1] = entry[0]
    index = np.concatenate([entries, real.entries["heldout"]]).tobytes()
    record = real.record | {"index": hashlib.sha256(index).hexdigest()}
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "dataset.json").write_bytes(shards.record_text(record))
    (tmp_path / "big" / "index.bin").write_bytes(index)
    (tmp_path / "big" / "tokens").symlink_to(folder / "tokens")
    (tmp_path / "big" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    dataset = Store(str(tmp_path / "big")).open(64, tmp_path)
    last = (count - 1 << 26) // 64
    assert dataset.size("train") > last > 2e10
    got = dataset.examples("train", np.array([last + 3]))
    assert np.array_equal(got["tokens"][0], stream(real)[3 * 64 : 4 * 64])
