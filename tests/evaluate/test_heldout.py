"""The held-out loss of `llmjax evaluate` is that of training, of any text, on any mesh."""

import jax
import numpy as np
import pytest
from judging import RUN, judging, program, weights

from llmjax.data.batches import place
from llmjax.data.tokenizer import Bytes
from llmjax.errors import DATA, Refused
from llmjax.evaluate import heldout, interval

WORDS = ["a quick brown fox", "jumps", "over", "the lazy dog", "again and again " * 8, "ä€", "end"]


@pytest.fixture(scope="module")
def dataset() -> heldout.Texts:
    return heldout.texts([f"{word} {n}" for n, word in enumerate(WORDS * 5)], Bytes().build(), RUN.sequence)


def test_every_token_of_a_text_is_a_target_once(dataset):
    found = dataset.examples("heldout", np.arange(dataset.size("heldout") + 1))
    assert found["weights"].sum() == dataset.heldout_tokens == len(dataset.tokens) - 1
    targets = found["targets"][found["weights"] == 1]
    np.testing.assert_array_equal(targets, dataset.tokens[1:])
    np.testing.assert_array_equal(found["tokens"][found["weights"] == 1], dataset.tokens[:-1])
    assert not found["weights"][-1].any()  # a row past the end
    assert dataset.heldout_bytes == np.sum(dataset.tokens < 256)


def test_rows_belong_to_the_document_that_they_begin_in():
    tokens_NT = np.array([[9, 1, 1], [1, 9, 2], [2, 2, 2], [9, 3, 9], [4, 9, 5], [9, 6, 6]])
    found = heldout.documents(tokens_NT[:, 0] == 9, np.sum(tokens_NT == 9, 1))
    np.testing.assert_array_equal(found, [1, 1, 2, 3, 4, 6])


@pytest.mark.parametrize(("layout", "devices"), [("dp", 1), ("fsdp_tp_sp", 8), ("ring", 8)])
def test_sums_of_rows_are_what_training_evaluates(dataset, layout, devices):
    with judging(layout, devices) as judge:
        measured = heldout.measure(judge.program, judge.model, dataset)
        total = np.zeros(2)
        size, batch = dataset.size("heldout"), judge.program.run.batch
        for rows in np.append(np.arange(size), np.full(-size % batch, size)).reshape(-1, batch):
            sharding = judge.program.batch_sharding()
            arrays = place(dataset, "heldout", rows, accumulate=judge.program.accumulate, sharding=sharding)
            nats, sums = jax.device_get(judge.program.evaluate(judge.model, arrays))
            total += np.array([nats, sums["weight"]])
    assert measured.nats_N.sum() == pytest.approx(total[0], rel=1e-6)
    assert measured.weight_N.sum() == total[1] == dataset.heldout_tokens
    assert len(measured.nats_N) == len(measured.cluster_N) == size
    assert np.all(np.diff(measured.cluster_N) >= 0)


def test_logits_taken_in_pieces_give_the_same_sums(dataset):
    rows = np.arange(8)
    found = []
    for here in (program(), program(loss_chunk=16)):
        with here.context():
            model = weights(here)
            arrays = place(dataset, "heldout", rows, accumulate=here.accumulate, sharding=here.batch_sharding())
            found.append(jax.device_get(heldout.rows.sums(model, arrays)))
    assert program(loss_chunk=16).compute.chunk == 16
    np.testing.assert_allclose(found[1]["nats"], found[0]["nats"], rtol=1e-6)
    np.testing.assert_array_equal(found[1]["missed"], found[0]["missed"])


def test_numbers_follow_from_the_sums(dataset):
    count = 12
    random = np.random.default_rng(0)
    weight_N = np.full(count, dataset.heldout_tokens / count)
    nats_N, missed_N = weight_N * random.uniform(1, 3, count), weight_N * random.uniform(0, 1, count)
    facts = heldout.judged(heldout.Measured(nats_N, missed_N, weight_N, np.arange(count)), dataset)
    loss = nats_N.sum() / dataset.heldout_tokens
    assert facts["loss"]["value"] == pytest.approx(loss)
    assert facts["perplexity"]["value"] == pytest.approx(np.exp(loss))
    assert facts["bits_per_byte"]["value"] == pytest.approx(nats_N.sum() / np.log(2) / dataset.heldout_bytes)
    assert facts["right"]["value"] == pytest.approx(1 - missed_N.sum() / dataset.heldout_tokens)
    for name in ("loss", "perplexity", "bits_per_byte", "right"):
        assert facts[name]["low"] < facts[name]["value"] < facts[name]["high"]
    assert facts["perplexity"]["low"] == pytest.approx(np.exp(facts["loss"]["low"]))
    assert (facts["targets"], facts["rows"], facts["documents"]) == (dataset.heldout_tokens, count, count)
    assert facts["stretches"] == 0


@pytest.mark.parametrize(("rows", "stretches"), [(39, 0), (200, 20)])
def test_one_long_document_has_an_interval_over_stretches_of_it(dataset, rows, stretches):
    drift_N, weight_N = np.sin(np.arange(rows) / 8), np.full(rows, 64.0)  # rows that are near are alike
    nats_N = weight_N * (2 + drift_N)
    facts = heldout.judged(heldout.Measured(nats_N, nats_N, weight_N, np.zeros(rows, int)), dataset)
    assert (facts["documents"], facts["stretches"]) == (1, stretches)
    assert (facts["loss"]["low"] is None) == (not stretches)
    if stretches:
        by_rows = interval.of_ratio(nats_N, weight_N, np.arange(rows))
        assert facts["loss"]["low"] < by_rows[0] and facts["loss"]["high"] > by_rows[1]


def test_a_text_that_cannot_be_read_is_refused(tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(Bytes().build().to_str())
    with pytest.raises(Refused, match=r"data is '.*nowhere', which does not exist: give a text file") as refused:
        heldout.read(str(tmp_path / "nowhere"), tokenizer, 64, tmp_path)
    assert refused.value.code == DATA
    (tmp_path / "odd.txt").write_bytes(b"ab\xff")
    with pytest.raises(Refused, match=r"odd\.txt' is not UTF-8 \(byte 2\)"):
        heldout.read(str(tmp_path / "odd.txt"), tokenizer, 64, tmp_path)
