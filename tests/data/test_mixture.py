"""A mixture gives each source its share of every stretch of rows, exactly, and walks each without replacement."""

import numpy as np
import pytest

from llmjax.data import mixture
from llmjax.data.build import Build, build
from llmjax.data.dataset import Synthetic
from llmjax.data.mixture import Mixture, Phase
from llmjax.data.stored import Store
from llmjax.data.tokenizer import BPE
from llmjax.errors import Refused


def opened(weights=(0.7, 0.2, 0.1), rows=(40, 50, 60), later=(), epochs=0.0):
    return Mixture(tuple(Synthetic(64, n) for n in rows), weights, later, epochs).open(8, "unused")


def sources_of(dataset, rows):
    return np.searchsorted(dataset._first("train"), rows, "right") - 1


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (1, 1, 1), (1e-6, 5, 3), (5, 1e-6, 3), (0.0, 2, 1)])
def test_after_any_number_of_rows_each_source_is_within_as_many_rows_of_its_share_as_there_are(weights, monkeypatch):
    monkeypatch.setattr(mixture, "PERIOD", 1000)
    mixture._through.cache_clear()
    chosen = np.array([mixture.at(weights, position)[0] for position in range(3500)])
    realised = np.cumsum(chosen[:, None] == np.arange(3), axis=0)
    asked = np.arange(1, 3501)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(realised - asked).max() <= 3
    for n in (0, 1, 999, 1000, 1001, 3500):
        assert mixture.counts(weights, n) == np.bincount(chosen[:n], minlength=3).tolist()
    far = 10**15
    assert np.abs(np.array(mixture.counts(weights, far), float) - far * np.array(weights) / sum(weights)).max() <= 3
    mixture._through.cache_clear()


def test_each_source_is_walked_without_replacement():
    dataset = opened()
    rows = np.concatenate([mixture.order(dataset, step, batch=16, seed=3) for step in range(60)])
    for source, size in enumerate((40, 50, 60)):
        own = rows[sources_of(dataset, rows) == source]
        for epoch in range(len(own) // size):
            assert len(set(own[epoch * size : (epoch + 1) * size])) == size
    assert mixture.seen(dataset, 60, 16) == np.bincount(sources_of(dataset, rows)).tolist()


def test_batches_of_another_size_walk_the_same_rows_and_seeds_differ():
    dataset = opened()
    rows = [np.concatenate([mixture.order(dataset, s, batch=b, seed=1) for s in range(240 // b)]) for b in (2, 16, 40)]
    assert np.array_equal(rows[0], rows[1]) and np.array_equal(rows[0], rows[2])
    assert not np.array_equal(rows[1][:16], mixture.order(dataset, 0, batch=16, seed=2))


def test_weights_change_at_a_step_and_the_walks_go_on():
    dataset = opened((1, 1, 0), later=(Phase(10, (0, 1, 3)), Phase(20, (1, 0, 0))))
    rows = [mixture.order(dataset, step, batch=8, seed=0) for step in range(30)]
    got = [np.bincount(sources_of(dataset, np.concatenate(rows[a : a + 10])), minlength=3) for a in (0, 10, 20)]
    assert [g.tolist() for g in got] == [[40, 40, 0], [0, 20, 60], [80, 0, 0]]
    first = np.concatenate(rows)
    own = first[sources_of(dataset, first) == 1]
    assert len(set(own[:50])) == 50
    assert [mixture.seen(dataset, n, 8) for n in (10, 20, 30)] == [[40, 40, 0], [40, 60, 60], [120, 60, 60]]
    assert [line[1:] for line in mixture.report(dataset, 20, 8)] == [
        ["25.000%", "25.000%", "40", "1.00"],
        ["37.500%", "37.500%", "60", "1.20"],
        ["37.500%", "37.500%", "60", "1.00"],
    ]


def test_rows_are_those_of_the_sources():
    dataset = opened()
    rows = np.array([0, 39, 40, 89, 90, 149, 150])
    got = dataset.examples("train", rows)
    for n, (source, row) in enumerate([(0, 0), (0, 39), (1, 0), (1, 49), (2, 0), (2, 59)]):
        assert np.array_equal(got["tokens"][n], dataset.sources[source].examples("train", np.array([row]))["tokens"][0])
    assert not got["weights"][6].any() and got["weights"][:6].all()


def test_the_fingerprint_follows_sources_and_weights():
    made = [opened(), opened((0.7, 0.1, 0.2)), opened(rows=(50, 40, 60)), opened(later=(Phase(5, (1, 1, 1)),))]
    assert len({dataset.fingerprint for dataset in made}) == 4 and opened().fingerprint == made[0].fingerprint


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(weights=(0, 0, 0)), r"data\.weights"),
        (dict(weights=(1, 2)), "2 numbers for 3"),
        (dict(weights=(1, -1, 1)), r"data\.weights"),
        (dict(weights=(1, float("nan"), 1)), r"data\.weights"),
        (dict(later=(Phase(0, (1, 1, 1)),)), r"data\.later\[0\]\.step"),
        (dict(later=(Phase(3, (0, 0, 0)),)), r"data\.later\[0\]\.weights"),
        (dict(epochs=-1.0), r"data\.epochs"),
    ],
)
def test_bad_fields_are_refused_by_name(options, said):
    with pytest.raises(Refused, match=said) as refused:
        opened(**options)
    assert refused.value.code == 2


def test_a_source_that_would_repeat_too_often_is_refused_before_the_run():
    dataset = opened(epochs=1.0)
    mixture.check(dataset, 3, 16)
    with pytest.raises(Refused, match=r"gone through 2\.\d+ times in 10 steps.*data\.epochs is 1") as refused:
        mixture.check(dataset, 10, 16)
    assert refused.value.code == 65


def test_sources_of_two_tokenizers_are_refused(tmp_path):
    text = "some text, and more of it\n" * 300
    for n in range(20):
        (tmp_path / f"{n}.txt").write_text(text)
    BPE(257).build([text]).save(str(tmp_path / "other.json"))
    source = tuple(str(tmp_path / f"{n}.txt") for n in range(20))
    for name, tokenizer in (("a", "bytes"), ("b", str(tmp_path / "other.json")), ("c", "bytes")):
        build(Build(source, tokenizer=tokenizer, heldout=0.3), tmp_path / name, 1, lambda _: None)
    stores = {name: Store(str(tmp_path / name)) for name in "abc"}
    with pytest.raises(Refused, match="another tokenizer") as refused:
        Mixture((stores["a"], stores["b"]), (1, 1)).open(16, tmp_path)
    assert refused.value.code == 65
    both = Mixture((stores["a"], stores["c"]), (1, 1)).open(16, tmp_path)
    assert both.heldout_bytes == 2 * both.sources[0].heldout_bytes
    counted = both.examples("heldout", np.arange(both.size("heldout")))["weights"].sum()
    assert counted == both.heldout_tokens
