"""Rows in an order of their own: exact, alike anywhere, each once in an epoch."""

import itertools
import json

import numpy as np
import pytest

from llmjax.data import mixture, ordering, packing, shards
from llmjax.data.batches import order, ranked
from llmjax.data.build import Build, build
from llmjax.data.mixture import Mixture
from llmjax.data.stored import Store
from llmjax.errors import Refused

LENGTHS = np.random.default_rng(0).geometric(1 / 40, 600) + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("ordering")
    for part in range(3):
        lines = [json.dumps(dict(text=chr(97 + n % 26) * int(LENGTHS[n]))) + "\n" for n in range(part, 600, 3)]
        (root / f"{part}.jsonl").write_text("".join(lines))
    source = tuple(str(root / f"{part}.jsonl") for part in range(3))
    build(Build(source, heldout=0.1), root / "store", 1, lambda _: None)
    return root / "store"


def walk(dataset, steps, batch=16, first=0, seed=0):
    size, own = dataset.size("train"), ranked(dataset)
    return np.concatenate([order(s, batch=batch, size=size, seed=seed, ranked=own) for s in range(first, steps)])


def test_stored_rows_come_one_after_another_through_every_epoch(folder, tmp_path):
    dataset = Store(str(folder), order="stored").open(64, tmp_path)
    size = dataset.size("train")
    assert np.array_equal(walk(dataset, 100), np.arange(1600) % size)
    assert np.array_equal(walk(dataset, 100, first=70), walk(dataset, 100)[70 * 16 :])


@pytest.mark.parametrize("packing_", ["split", "best_fit"])
@pytest.mark.parametrize("sequence", [16, 100])
def test_rows_of_the_shortest_documents_come_first(folder, tmp_path, packing_, sequence):
    dataset = Store(str(folder), packing_, segments=True, order="short_first").open(sequence, tmp_path)
    size = dataset.size("train")
    rows = walk(dataset, -(-2 * size // 8), batch=8)
    assert sorted(rows[:size]) == list(range(size)) and np.array_equal(rows[:size], rows[size : 2 * size])
    got = dataset.examples("train", rows[:size])
    held = [len(np.unique(s[w > 0])) for s, w in zip(got["segments"], got["weights"], strict=True)]
    if packing_ == "split":  # an end of text at the very end of a packed row is no target, so has no weight there
        assert held == sorted(held, reverse=True)
    counted = ordering.documents_of_rows(dataset.store, sequence, size, dataset.packed)[rows[:size]]
    assert (np.diff(counted) <= 0).all() and counted[0] > counted[-1] and np.abs(counted - held).max() <= 1
    equal = rows[:size][counted == counted[-1]]
    assert len(equal) > 10 and not np.array_equal(equal, np.sort(equal))  # mixed


def test_an_order_is_decided_once_and_a_damaged_one_is_refused(folder, tmp_path):
    first = Store(str(folder), order="short_first").open(32, tmp_path)
    path = next(tmp_path.rglob("order.bin"))
    written = path.stat().st_mtime_ns
    again = Store(str(folder), order="short_first").open(32, tmp_path)
    assert path.stat().st_mtime_ns == written and np.array_equal(first.ranked, again.ranked)
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    for damaged in (bytes(content), bytes(content[:-8])):
        path.write_bytes(damaged)
        with pytest.raises(Refused, match=r"order\.bin") as refused:
            Store(str(folder), order="short_first").open(32, tmp_path)
        assert refused.value.code == 65


def test_the_order_is_part_of_what_a_run_is_trained_on(folder, tmp_path):
    orders = ("shuffle", "stored", "short_first")
    opened = [Store(str(folder), order=kind).open(32, tmp_path) for kind in orders]
    assert len({dataset.fingerprint for dataset in opened}) == 3
    assert opened[0].fingerprint == Store(str(folder), epochs=3.0).open(32, tmp_path).fingerprint


def test_in_a_mixture_each_source_keeps_its_own_order(folder, tmp_path):
    stores = Store(str(folder), order="stored"), Store(str(folder), "best_fit", order="short_first"), Store(str(folder))
    dataset = Mixture(stores, (2, 1, 1)).open(64, tmp_path)
    rows = np.concatenate([mixture.order(dataset, step, batch=8, seed=0) for step in range(40)])
    first = np.cumsum([0, *(source.size("train") for source in dataset.sources)])
    own = [rows[(rows >= a) & (rows < b)] - a for a, b in itertools.pairwise(first)]
    assert np.array_equal(own[0], np.arange(160) % dataset.sources[0].size("train"))
    short = np.array(dataset.sources[1].ranked)
    assert np.array_equal(own[1], short[np.arange(80) % len(short)])
    assert not np.array_equal(own[2], np.sort(own[2]))


def test_a_source_exhausted_under_its_own_rule_is_refused(folder, tmp_path):
    dataset = Mixture((Store(str(folder), epochs=1.0), Store(str(folder))), (1, 1)).open(64, tmp_path)
    size = dataset.sources[0].size("train")
    mixture.check(dataset, size // 8, 16)
    with pytest.raises(Refused, match=r"gone through 2\.0\d times in .* data\.epochs is 1") as refused:
        mixture.check(dataset, size // 4 + 1, 16)
    assert refused.value.code == 65


@pytest.mark.parametrize(("fields", "said"), [(dict(order="sorted"), "data.order"), (dict(epochs=-1.0), "data.epochs")])
def test_bad_fields_are_refused_by_name(fields, said, tmp_path):
    with pytest.raises(Refused, match=said) as refused:
        Store("x", **fields).open(8, tmp_path)
    assert refused.value.code == 2


def test_documents_of_a_row_are_counted_across_shards_and_groups(folder, tmp_path, monkeypatch):
    store = shards.open_shards(folder)
    starts = np.concatenate([group["start"] for group in packing.documents(store, "train")])
    monkeypatch.setattr(packing, "_GROUP", 50)
    rows = (int(store.first["train"][-1]) - 1) // 30
    counted = ordering.documents_of_rows(store, 30, rows, None)
    for row in (0, 1, 77, rows - 1):
        inside = ((starts > row * 30) & (starts < (row + 1) * 30)).sum()
        assert counted[row] == 1 + inside
