"""Rows are the right windows of the stream, and the held-out accounting is exact."""

import dataclasses

import numpy as np
import pytest

from llmjax.data.dataset import ArrayDataset, Synthetic, SyntheticDataset, Text, check_rows
from llmjax.data.tokenizer import BPE, Bytes
from llmjax.errors import Refused


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    for i in range(30):
        (root / f"{i}.txt").write_text(f"Line {i} of ünï text.\n" * (i + 3))
    return root


def test_row_i_is_the_window_at_i_times_t(folder, tmp_path):
    dataset = Text(str(folder), Bytes(), 0.2).open(16, tmp_path / "cache")
    stream = np.asarray(dataset.store.train)
    rows = np.array([0, 3, 3, dataset.size("train") - 1])
    got = dataset.examples("train", rows)
    assert {k: (v.dtype, v.shape) for k, v in got.items()} == {
        "tokens": (np.int32, (4, 16)),
        "targets": (np.int32, (4, 16)),
        "weights": (np.float32, (4, 16)),
    }
    for n, row in enumerate(rows):
        assert np.array_equal(got["tokens"][n], stream[row * 16 : row * 16 + 16])
        assert np.array_equal(got["targets"][n], stream[row * 16 + 1 : row * 16 + 17])
    assert (got["weights"] == 1).all()
    assert dataset.size("train") == (len(stream) - 1) // 16


@pytest.mark.parametrize("sequence", [1, 7, 64, 100_000])
def test_every_heldout_token_is_a_target_exactly_once(folder, tmp_path, sequence):
    dataset = Text(str(folder), Bytes(), 0.2).open(sequence, tmp_path / "cache")
    stream = np.asarray(dataset.store.heldout)
    got = dataset.examples("heldout", np.arange(dataset.size("heldout")))
    counted = got["weights"] == 1
    assert np.array_equal(got["targets"][counted], stream[1:])
    assert np.array_equal(got["tokens"][counted], stream[:-1])
    assert set(np.unique(got["weights"])) <= {0.0, 1.0}


def test_heldout_bytes_are_the_files_bytes(folder, tmp_path):
    dataset = Text(str(folder), Bytes(), 0.2).open(16, tmp_path / "cache")
    names = dataset.store.record["files"]["heldout"]
    assert dataset.heldout_bytes == sum((folder / name).stat().st_size for name in names)
    # as bytes are tokens here, the targets are the bytes and an end of text before each file but the first
    assert dataset.examples("heldout", np.arange(dataset.size("heldout")))["weights"].sum() == (
        dataset.heldout_bytes + len(names) - 1
    )


def test_rows_past_the_end_are_blank(folder, tmp_path):
    for dataset in (Text(str(folder), Bytes()).open(16, tmp_path / "cache"), Synthetic(rows=8).open(16, tmp_path)):
        for split in ("train", "heldout"):
            size = dataset.size(split)
            weights = dataset.examples(split, np.array([0, size, size + 5]))["weights"]
            assert weights[0].any() and not weights[1:].any()
        with pytest.raises(IndexError):
            dataset.examples("train", np.array([-1]))


def test_fingerprint_follows_content_tokenizer_and_sequence_only(folder, tmp_path):
    def fingerprint(sequence=16, tokenizer=None, cache="cache", heldout=0.2):
        return Text(str(folder), tokenizer or BPE(300), heldout).open(sequence, tmp_path / cache).fingerprint

    first = fingerprint()
    assert first == fingerprint() == fingerprint(cache="elsewhere")
    others = [fingerprint(sequence=17), fingerprint(tokenizer=BPE(280)), fingerprint(heldout=0.5)]
    (folder / "0.txt").write_text("changed\n")
    assert len({first, *others, fingerprint()}) == 5


def test_text_dataset_tells_its_tokenizer_vocabulary_and_baselines(folder, tmp_path):
    said = []
    dataset = Text(str(folder), BPE(270)).open(16, tmp_path / "cache", said.append)
    assert dataset.tokenizer.get_vocab_size() == dataset.vocab == 270
    assert dataset.tokenizer.decode(dataset.tokenizer.encode("ünï\n  x").ids) == "ünï\n  x"
    assert dataset.baselines.keys() == {"gzip", "xz"} and all(0 < bits < 8 for bits in dataset.baselines.values())
    assert said
    assert dataset.examples("train", np.arange(dataset.size("train")))["tokens"].max() < dataset.vocab


def test_single_text_file_is_a_corpus(tmp_path):
    (tmp_path / "book.txt").write_text("A line.\n" * 500)
    dataset = Text(str(tmp_path / "book.txt"), Bytes()).open(32, tmp_path / "cache")
    assert dataset.heldout_bytes == 400 and dataset.size("train") == 112


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [("path", "nowhere.txt", 65), ("heldout", 1.5, 2), ("tokenizer", BPE(7), 2), ("sequence", 0, 2)],
)
def test_bad_fields_are_refused_by_name_and_leave_no_store(folder, tmp_path, field, value, code):
    config, sequence = Text(str(folder)), 16
    if field == "sequence":
        sequence = value
    else:
        config = dataclasses.replace(config, **{field: value})
    with pytest.raises(Refused, match=field) as refused:
        config.open(sequence, tmp_path / "cache")
    assert refused.value.code == code
    assert not list((tmp_path / "cache").glob("*"))


def test_fewer_rows_than_a_batch_are_refused_with_code_65():
    dataset = Synthetic(rows=8).open(4, "unused")
    check_rows(dataset, 8)
    with pytest.raises(Refused, match=r"8 training rows.*batch of 9") as refused:
        check_rows(dataset, 9)
    assert refused.value.code == 65


def test_synthetic_rows_are_a_pure_function_of_row_and_length(tmp_path):
    dataset = Synthetic(vocab=100, rows=64).open(32, tmp_path)
    assert isinstance(dataset, SyntheticDataset) and not list(tmp_path.iterdir())
    all_rows = dataset.examples("train", np.arange(64))
    some = dataset.examples("train", np.array([9, 3]))
    assert np.array_equal(some["tokens"], all_rows["tokens"][[9, 3]])
    assert np.array_equal(all_rows["tokens"][:, 1:], all_rows["targets"][:, :-1])
    assert len(np.unique(all_rows["tokens"], axis=0)) > 60
    assert not np.array_equal(dataset.examples("heldout", np.arange(8))["tokens"], all_rows["tokens"][:8])
    assert all_rows["tokens"][0, :8].tolist() == [67, 72, 15, 8, 59, 16, 15, 8]
    assert (dataset.tokenizer, dataset.heldout_bytes, dataset.baselines) == (None, None, {})
    assert dataset.fingerprint != Synthetic(vocab=100, rows=64).open(33, tmp_path).fingerprint


@pytest.mark.parametrize("vocab", [2, 35, 256, 1000])
def test_synthetic_tokens_follow_the_rule_as_often_as_the_floor_says(vocab):
    dataset = Synthetic(vocab=vocab, rows=256).open(256, "unused")
    got = dataset.examples("train", np.arange(256))
    tokens, targets = got["tokens"].astype(int), got["targets"].astype(int)
    assert tokens.min() >= 0 and tokens.max() == vocab - 1
    factor = {2: 5, 35: 11, 256: 5, 1000: 7}[vocab]
    follows = np.mean(targets == (factor * tokens + 3) % vocab)
    expected = 15 / 16 + 1 / 16 / vocab
    assert follows == pytest.approx(expected, abs=0.01)
    loss = -follows * np.log(expected) - (1 - follows) * np.log(1 / 16 / vocab)
    assert dataset.floor == pytest.approx(loss, rel=0.05)


@pytest.mark.parametrize("bad", [{"vocab": 1}, {"rows": 0}])
def test_bad_synthetic_fields_are_refused_with_code_2(bad):
    with pytest.raises(Refused, match=next(iter(bad))) as refused:
        Synthetic(**bad).open(8, "unused")
    assert refused.value.code == 2


def test_array_dataset_gives_rows_and_a_fingerprint_of_its_content():
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6)
    dataset = ArrayDataset({"x": x, "y": y}, {"x": x[:2], "y": y[:2]})
    assert dataset.size("train") == 6 and dataset.size("heldout") == 2
    got = dataset.examples("train", np.array([5, 0]))
    assert np.array_equal(got["x"], x[[5, 0]]) and np.array_equal(got["y"], [5, 0])
    assert dataset.fingerprint == ArrayDataset({"y": y.copy(), "x": x.copy()}, {"x": x[:2], "y": y[:2]}).fingerprint
    others = [
        ArrayDataset({"x": x + 1, "y": y}, dataset.heldout),
        ArrayDataset({"x": x.astype(np.float32), "y": y}, dataset.heldout),
        ArrayDataset({"x": x.reshape(6, 1, 2), "y": y}, dataset.heldout),
        ArrayDataset({"z": x, "y": y}, dataset.heldout),
        ArrayDataset(dataset.train, dataset.train),
    ]
    assert len({dataset.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert dataset.examples("heldout", np.array([1, 2]))["weights"].tolist() == [1, 0]
    with pytest.raises(Refused) as refused:
        ArrayDataset({"x": x, "y": y[:5]}, {})
    assert refused.value.code == 65


def test_the_corpus_path_is_a_command_line_flag(tmp_path):
    tyro = pytest.importorskip("tyro")

    @dataclasses.dataclass(frozen=True)
    class Config:
        data: Text | Synthetic = dataclasses.field(default_factory=Text)

    def parse(*arguments):
        return tyro.cli(tyro.conf.AvoidSubcommands[Config], args=arguments).data

    assert parse() == Text()
    assert parse("--data.path", "x", "--data.tokenizer.vocab", "512") == Text(path="x", tokenizer=BPE(512))
