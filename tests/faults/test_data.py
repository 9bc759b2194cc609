"""Data that is gone, damaged, replaced, or that fails while it is read: never fewer or other tokens in silence."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llmjax.data import corpus, store
from llmjax.data.batches import place, prefetch
from llmjax.data.dataset import SyntheticDataset, Text
from llmjax.data.tokenizer import Bytes
from llmjax.errors import DATA, IO, Refused

LIMIT = 200  # seconds for any command
FAILING = """
import os, threading, time
from llmjax import cli
from llmjax.data.dataset import SyntheticDataset
examples = SyntheticDataset.examples
def failing(self, split, rows):
    if split == "train" and (left := left_after()) < 0:
        {how}
    return examples(self, split, rows)
calls = [0]
def left_after():
    calls[0] += 1
    return {after} - calls[0]
SyntheticDataset.examples = failing
if __name__ == "__main__":
    cli.main()
"""
RUN = """
from llmjax.data.dataset import Synthetic, Text
from llmjax.data.tokenizer import Bytes
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.run import Run
from llmjax.train.loss import NextToken
from meshes import local

run = Run(
    model=Llama(vocab=260, layers=1, width=16, heads=2, kv_heads=2, head_dim=8, ff=32, positions=16),
    data={data}, optimizer=AdamW(lr=3e-3), loss=NextToken(), mesh=local.cluster,
    steps={steps}, batch=8, sequence=16, dtype="float32", save_every=4,
)
"""
TEXT = 'Text(path="corpus", tokenizer=Bytes(), heldout=0.2)'


def write_corpus(folder: Path, word: str = "fox") -> None:
    folder.mkdir(exist_ok=True)
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"{number} the quick brown {word} jumps over the lazy dog\n" * 40)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def place_(tmp_path):
    write_corpus(tmp_path / "corpus")
    (tmp_path / "texts.py").write_text(RUN.format(data=TEXT, steps=12))
    (tmp_path / "long.py").write_text(RUN.format(data=TEXT, steps=100_000))
    (tmp_path / "made.py").write_text(RUN.format(data="Synthetic(vocab=260, rows=256)", steps=12))
    return tmp_path


def started(folder: Path, compiled: Path, *words: str, module=("-m", "llmjax.cli"), **how) -> subprocess.Popen:
    cache = dict(JAX_COMPILATION_CACHE_DIR=str(compiled), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1")
    return subprocess.Popen(
        [sys.executable, *module, *words], cwd=folder, env=os.environ | cache, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how,
    )  # fmt: skip


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and what was said on stderr."""
    try:
        _, err = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    return process.returncode, err


def sentence(err: str) -> str:
    """The one sentence that a refusal is, without a traceback."""
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("llmjax: ")]
    return line


def lines(folder: Path, run: str) -> list[dict]:
    path = folder / "runs" / run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def open_text(folder: Path, words: str = "corpus"):
    return Text(path=str(folder / words), tokenizer=Bytes(), heldout=0.2).open(16, folder / "cache")


def test_B1_a_shard_missing_at_the_start_is_refused_by_name(place_):
    for name in ("train.bin", "heldout.bin", "tokenizer.json", "dataset.json"):
        path = open_text(place_).store.folder / name
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(Refused, match=f"{name}' cannot be read .*No such file.*: delete the folder") as refused:
            open_text(place_)
        assert refused.value.code == DATA
        path.write_bytes(content)


@pytest.mark.parametrize("harm", ["unlink", "truncate"])
def test_B1_a_shard_that_goes_while_it_is_read_is_refused_by_name_and_gives_no_row(place_, harm):
    dataset = open_text(place_)
    assert dataset.examples("train", np.arange(4))["weights"].sum() == 64
    path = dataset.store.folder / "train.bin"
    path.unlink() if harm == "unlink" else os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(Refused, match=r"train.bin' (cannot be read|has .* bytes where)") as refused:
        dataset.examples("train", np.arange(4))
    assert refused.value.code == DATA
    assert len(dataset.examples("heldout", np.arange(2))["tokens"]) == 2


@pytest.mark.faults
@pytest.mark.parametrize("harm", ["unlink", "truncate"])
def test_B1_a_run_whose_shard_goes_midway_stops_with_65_and_names_step_and_file(place_, compiled, harm):
    process = started(place_, compiled, "train", "long.py", "--prompts")
    try:
        until = time.monotonic() + LIMIT
        while len(lines(place_, "long")) < 3 and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        (path,) = (place_ / "runs" / ".cache" / "data").glob("*/train.bin")
        path.unlink() if harm == "unlink" else os.truncate(path, 100)
        code, err = ended(process)
    finally:
        process.kill()
    assert code == DATA and "step " in sentence(err) and str(path.name) in sentence(err)
    assert all(line["tokens"] == 128 * line["step"] for line in lines(place_, "long") if "tokens" in line)


def test_B2_every_flip_and_every_cut_of_a_store_is_found_when_it_is_opened(place_):
    folder, random, found, tried = open_text(place_).store.folder, np.random.default_rng(0), 0, 0
    for name in (*store.FILES, "dataset.json"):
        path = folder / name
        content = path.read_bytes()
        harmed = []
        for at in random.integers(len(content), size=60):
            harmed.append(content[:at] + bytes([content[at] ^ 1 << random.integers(8)]) + content[at + 1 :])
        harmed += [content[:size] for size in (0, len(content) // 2, len(content) - 1)] + [content + b"\0"]
        for other in harmed:
            path.write_bytes(other)
            tried += 1
            with pytest.raises(Refused) as refused:
                store.open_store(folder)
            found += refused.value.code == DATA and name in str(refused.value)
        path.write_bytes(content)
    assert found == tried == 4 * 64
    store.open_store(folder)


@pytest.mark.parametrize("name", [*store.FILES, "dataset.json"])
def test_B2_a_symbolic_link_in_a_store_is_not_followed(place_, name):
    folder = open_text(place_).store.folder
    (folder / name).rename(place_ / "elsewhere")
    (folder / name).symlink_to(place_ / "elsewhere")
    with pytest.raises(Refused) as refused:
        store.open_store(folder)
    assert refused.value.code == DATA and name in str(refused.value)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "null", "{}", '{"dtype": "O"}', '{"a": ' * 50_000], ids=["deep", "null", "{}", "O", "torn"]
)
def test_B2_a_record_that_is_none_is_refused(place_, text):
    folder = open_text(place_).store.folder
    (folder / "dataset.json").write_text(text)
    with pytest.raises(Refused, match=r"dataset.json' is damaged") as refused:
        store.open_store(folder)
    assert refused.value.code == DATA


@pytest.mark.parametrize(
    ("fields", "damaged"),
    [
        (dict(dtype="|O"), True),
        (dict(train=dict(tokens=10**15, bytes=1, documents=1)), True),
        (dict(sizes={"train.bin": 10**15, "heldout.bin": 1, "tokenizer.json": 1}), True),
        (dict(sizes={"../../x": 1}), True),
        (dict(vocab=3), False),
    ],
    ids=["objects", "tokens", "sizes", "names", "none"],
)
def test_B2_a_record_that_claims_what_is_not_there_is_refused_even_with_a_sha256_that_is_right(place_, fields, damaged):
    folder = open_text(place_).store.folder
    record = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_bytes(store._text(record | fields))
    if damaged:
        with pytest.raises(Refused, match="is damaged"):
            store.open_store(folder)
    else:
        assert store.open_store(folder).record["vocab"] == 3


@pytest.mark.faults
def test_B2_and_B3_a_run_refuses_a_flipped_store_and_other_data_of_the_same_length_before_a_step(place_, compiled):
    words = ("train", "texts.py", "--steps", "4", "--name", "it")
    assert ended(started(place_, compiled, *words))[0] == 0
    more = (*words[:3], "12", *words[4:])
    (shard,) = (place_ / "runs" / ".cache" / "data").glob("*/train.bin")
    content, before = shard.read_bytes(), lines(place_, "it")
    (place_ / "runs" / "it" / "run.json").unlink()  # so that more steps are no other run
    shard.write_bytes(content[:1000] + bytes([content[1000] ^ 4]) + content[1001:])
    code, err = ended(started(place_, compiled, *more))
    assert code == DATA and "train.bin' holds other bytes than were written" in sentence(err)
    shard.write_bytes(content)
    write_corpus(place_ / "corpus", word="cat")
    code, err = ended(started(place_, compiled, *more))
    assert code == DATA and "was trained on other data" in sentence(err)
    assert lines(place_, "it") == before


@pytest.mark.faults
def test_B3_other_data_is_gone_on_with_when_a_person_says_so_and_recorded(place_, compiled):
    words = ("train", "texts.py", "--steps", "8", "--save-every", "4", "--name", "accepted")
    assert ended(started(place_, compiled, *words))[0] == 0
    folder = place_ / "runs" / "accepted"
    shutil.rmtree(folder / "checkpoints" / "8")
    events = [line for line in (folder / "events.jsonl").read_text().splitlines() if '"finish"' not in line]
    (folder / "events.jsonl").write_text("\n".join(events) + "\n")
    write_corpus(place_ / "corpus", word="dog")
    code, err = ended(started(place_, compiled, *words))
    assert code == DATA and "--accept-data" in sentence(err)
    assert ended(started(place_, compiled, *words, "--accept-data"))[0] == 0
    replaced = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines() if "replaced" in line]
    assert [event["step"] for event in replaced] == [4] and replaced[0]["before"] != replaced[0]["after"]


def batch_of(dataset, step: int):
    import jax

    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    sharding = jax.sharding.NamedSharding(mesh, jax.P(None, "data"))
    return place(dataset, "train", np.arange(4) + 4 * step, accumulate=2, sharding=sharding)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyError("doc 17"), DATA, "KeyError 'doc 17'"),
        (OSError(5, "Input/output error", "/data/x"), IO, "OSError .*Input/output error: '/data/x'"),
        (SystemExit(0), DATA, "SystemExit 0"),
        (Refused("the data says so.", IO), IO, "step 7: the data says so"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_B7_a_source_that_raises_is_one_sentence_with_step_rows_and_cause(monkeypatch, error, code, words):
    examples, calls = SyntheticDataset.examples, itertools.count()

    def failing(self, split, rows):
        if next(calls) == 6:
            raise error
        return examples(self, split, rows)

    monkeypatch.setattr(SyntheticDataset, "examples", failing)
    dataset, done = SyntheticDataset(64, 99, 8), []
    with pytest.raises(Refused, match=words) as refused:
        for step, _, _ in prefetch(lambda step: batch_of(dataset, step), 0, 20):
            done.append(step)
    assert done == list(range(6)) and refused.value.code == code and str(refused.value).startswith("step 7: ")
    assert isinstance(error, Refused) or "rows 24, 25, 26, 27 of the train data" in str(refused.value)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ('raise ValueError("a torn record")', DATA, "ValueError a torn record"),
        ("raise SystemExit", DATA, "SystemExit"),
        ('raise OSError(5, "Input/output error")', IO, "Input/output error"),
    ],
)
def test_B7_a_run_whose_source_fails_stops_and_goes_on_with_the_same_curve(place_, compiled, how, code, words):
    (place_ / "failing.py").write_text(FAILING.format(how=how, after=8))
    assert ended(started(place_, compiled, "train", "made.py", "--name", "golden"))[0] == 0
    found, err = ended(started(place_, compiled, "train", "made.py", module=("failing.py",)))
    assert found == code and words in sentence(err) and "step " in sentence(err) and "rows " in sentence(err)
    assert ended(started(place_, compiled, "train", "made.py"))[0] == 0
    curves = [
        {line["step"]: (line["loss"].hex(), line["grad_norm"].hex()) for line in lines(place_, run) if "loss" in line}
        for run in ("golden", "made")
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 12


@pytest.mark.faults
def test_B7_a_source_that_hangs_says_where_when_asked_and_ends_with_a_signal(place_, compiled):
    (place_ / "hanging.py").write_text(FAILING.format(how="time.sleep(10_000)", after=4))
    process = started(place_, compiled, "train", "made.py", module=("hanging.py",))
    try:
        until = time.monotonic() + LIMIT
        while len(lines(place_, "made")) < 3 and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(0.5)
        process.send_signal(signal.SIGUSR1)  # as the supervisor does
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
        code, err = ended(process)
    finally:
        process.kill()
    assert code == -signal.SIGKILL and "hanging.py" in err and "in failing" in err


def test_a_document_that_vanishes_between_being_found_and_read_is_refused_by_name(place_):
    found = corpus.files(place_ / "corpus")
    (place_ / "corpus" / "3.txt").unlink()
    with pytest.raises(Refused, match=r"3.txt' cannot be read .*No such file") as refused:
        corpus.read(found)
    assert refused.value.code == DATA


def test_a_document_that_changes_while_its_tokens_are_made_changes_no_store(place_):
    first = open_text(place_).store
    found, _ = corpus.read(corpus.files(place_ / "corpus"))
    write_corpus(place_ / "corpus", word="cat")
    again = store.ensure(
        found, Bytes(), 0.2, source="here", cache=place_ / "other", say=lambda _: write_corpus(place_ / "corpus", "cow")
    )
    assert again.record["fingerprint"] == first.record["fingerprint"]
    assert open_text(place_).store.record["fingerprint"] != first.record["fingerprint"]


@pytest.mark.parametrize("room", [0, 100, 5_000])
def test_a_disk_that_fills_while_the_store_is_built_leaves_no_half_of_one(place_, room):
    """A limit on the size of files is met as a full disk is: a write fails midway."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from pathlib import Path\n"
        "from llmjax.data.dataset import Text\nfrom llmjax.data.tokenizer import Bytes\n"
        "from llmjax.errors import Refused\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
        "try: Text(path='corpus', tokenizer=Bytes(), heldout=0.2).open(16, Path('cache'))\n"
        "except Refused as refused: print(refused); sys.exit(refused.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=place_, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == IO and "cannot take the token store" in done.stdout, done.stderr
    assert not list((place_ / "cache").iterdir())
    assert open_text(place_).size("train") > 8
