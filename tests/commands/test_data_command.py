"""From texts to a trained run on the command line, and what stands in the way is one sentence."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from llmjax import cli
from llmjax.commands.train import train
from llmjax.data import shards
from llmjax.data.mixture import Mixture
from llmjax.data.stored import Store
from llmjax.errors import Refused
from llmjax.models.llama import Llama
from llmjax.processes import Processes, Supervised
from llmjax.run import from_json, to_json


@pytest.fixture
def shell(monkeypatch, capsys, tmp_path):
    """Runs one command line in this interpreter, in an empty folder; gives its code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["llmjax", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        return end.value.code, shown.out, shown.err

    return command


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(dict(text=f"document {n}, " * (n % 9 + 1))) + "\n" for n in range(300)))
    return path


def tiny(data):
    run = cli.load("bench_small")
    model = Llama(
        vocab=257, layers=1, width=16, heads=2, kv_heads=2, head_dim=8, ff=16, positions=32, theta=1e4, tied=True
    )
    return dataclasses.replace(run, name="tiny", model=model, data=data, steps=3, batch=8, sequence=32)


def run(data):
    return train(tiny(data), Processes(), Supervised(), None)


def test_build_then_stats_then_show(shell, texts):
    code, out, _ = shell("data", "build", "store", "--source", texts, "--heldout", "0.1")
    assert code == 0 and "300" not in out and "fingerprint" in out
    assert shell("data", "build", "store", "--source", texts, "--heldout", "0.1")[1].startswith(
        "store is already built"
    )
    code, out, _ = shell("data", "stats", "store", "--sequence", "64", "256")
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and [row[:2] for row in rows[-4:]] == [
        [length, kind] for length in ("64", "256") for kind in ("split", "best_fit")
    ]
    assert rows[-1][-1] == "0.00%" and float(rows[-2][-1].rstrip("%")) > 10
    code, out, _ = shell("data", "show", "store", "--index", "2", "--sequence", "200", "--packing", "best_fit")
    assert code == 0 and "document " in out and "row 2 of" in out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("data", "buld"), 2, "did you mean build"),
        (("data",), 2, "give build, stats or show"),
        (("data", "build", "x", "--source", "nowhere"), 65, "'nowhere' does not exist"),
        (("data", "stats", "nowhere"), 65, "llmjax data build"),
        (("data", "build", "/proc/x", "--source", "texts.jsonl"), 74, "/proc"),
    ],
)
def test_a_mistake_is_one_sentence(shell, texts, words, code, said):
    ended = shell(*words)
    assert ended[0] == code and said in ended[2] and ended[2].count("\n") == 1


def test_a_full_disk_ends_with_code_74_and_what_was_built_is_gone_on_with(shell, texts, monkeypatch):
    with monkeypatch.context() as full:
        full.setattr(shards.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        code, _, err = shell("data", "build", "store", "--source", texts, "--workers", "1")
    assert code == 74 and "No space left on device" in err
    assert shell("data", "build", "store", "--source", texts, "--workers", "1")[0] == 0


@pytest.mark.parametrize("kind", ["split", "best_fit", "mixture"])
def test_a_run_trains_from_a_store(shell, texts, kind):
    shell("data", "build", "store", "--source", texts, "--heldout", "0.1")
    data = Store("store", "split" if kind == "mixture" else kind, segments=True)
    data = Mixture((data, data), (3.0, 1.0), epochs=2.0) if kind == "mixture" else data
    assert from_json(to_json(tiny(data))) == tiny(data)
    assert run(data) == 0
    metrics = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([m["loss"] for m in metrics if "loss" in m]).all()
    assert 0 < metrics[-1]["bits_per_byte"] < 12


def test_a_run_refuses_a_store_that_was_changed(shell, texts):
    shell("data", "build", "store", "--source", texts, "--heldout", "0.1")
    path = Path("store/tokens/000000-train.bin")
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(Refused, match=r"step 1: .*train\.bin.*other bytes") as refused:
        run(Store("store"))
    assert refused.value.code == 65
