"""N1-N5 and G1's neighbours: a step whose numbers cannot be right changes nothing, under every policy.

The runs are the product's own, in this process on eight devices; the tests only spoil what comes from the data.
"""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.commands import train as command
from llmjax.commands.replay import Options, replay
from llmjax.data.dataset import Synthetic
from llmjax.errors import Refused
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.processes import Processes
from llmjax.run import Guard, Run
from llmjax.train import loop
from llmjax.train.display import Display
from llmjax.train.loss import NextToken
from llmjax.train.records import read
from meshes import local

RUN = Run(
    model=Llama(vocab=64, layers=2, width=32, heads=4, kv_heads=4, head_dim=8, ff=64, positions=16),
    data=Synthetic(vocab=64, rows=256),
    optimizer=AdamW(lr=3e-3),
    loss=NextToken(),
    mesh=local.cluster,
    steps=12,
    batch=16,
    sequence=16,
    dtype="float32",
    save_every=4,
    keep=99,
)


@dataclasses.dataclass(frozen=True)
class Boosted:
    """The loss of the next token, times the largest weight of the batch."""

    def __call__(self, model, batch):
        boost = jnp.max(batch["weights"])
        total, sums = NextToken()(model, batch | dict(weights=jnp.minimum(batch["weights"], 1)))
        return total * boost, sums


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(command, "cache_compiled_programs", lambda runs: None)


@pytest.fixture
def spoil(monkeypatch):
    """spoil({step: what each weight of its batch becomes}) from now on; returns the list of batches that are placed."""
    original, used = loop.place, []

    def start(values, rows=slice(None)):
        used.clear()
        bad = {tuple(loop.rows_of(RUN, Sized, step - 1)): value for step, value in values.items()}

        def place(dataset, split, chosen, **how):
            batch = original(dataset, split, chosen, **how)
            if split == "train":
                used.append(tuple(chosen))
                if tuple(chosen) in bad:
                    weights = np.array(batch["weights"])
                    weights[:, rows] *= bad[tuple(chosen)]
                    batch["weights"] = jax.device_put(weights, batch["weights"].sharding)
            return batch

        monkeypatch.setattr(loop, "place", place)
        return used

    return start


class Sized:
    """As much of the data as says which rows a step reads."""

    @staticmethod
    def size(split):
        return 256


def train(tmp_path, name, run=RUN, **changes):
    """Trains in a folder; returns the run directory, and the refusal if it came to one."""
    run = dataclasses.replace(run, name=name, runs=str(tmp_path), **changes)
    refusal = None
    try:
        assert command.train(run, Processes(), display=Display(quiet=True)) == 0
    except Refused as found:
        refusal = found
    return run.folder(), refusal


def arrays(folder, step):
    with Checkpoints(folder / "checkpoints") as checkpoints:
        stored = ocp.metadata(checkpoints.folder / str(step)).metadata
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one) for name, a in stored.items()}
        return {name: np.asarray(x) for name, x in checkpoints.restore(step, wanted).items()}


def equal(a, b, *, but=()):
    assert a.keys() == b.keys()
    return {name for name in a if a[name].tobytes() != b[name].tobytes()} <= set(but)


def curve(folder, leave=()):
    return [
        (line["step"], line["loss"].hex(), line["grad_norm"].hex())
        for line in read(folder / "metrics.jsonl")
        if "loss" in line and line["step"] not in leave
    ]


@pytest.mark.fast
def test_n1_abort_names_step_rows_and_leaf_and_keeps_the_state_before_it(tmp_path, spoil):
    spoil({7: np.nan})
    folder, refusal = train(tmp_path, "n1")
    rows = ", ".join(map(str, loop.rows_of(RUN, Sized, 6)))
    assert refusal.code == 70 and str(refusal).startswith("step 7: the loss is nan and the gradient norm nan")
    assert f"(rows {rows})" in str(refusal) and "in the gradient of model.blocks." in str(refusal)
    assert Checkpoints(folder / "checkpoints").latest() == 6
    assert all(np.isfinite(x).all() for x in arrays(folder, 6).values() if x.dtype == np.float32)
    kept = json.loads((folder / "faults" / "7.json").read_text())
    assert kept["rows"] == loop.rows_of(RUN, Sized, 6).tolist() and kept["gradient_norms"]["model.embed_VD"] == "nan"
    assert {"seed", "rng", "state", "batch", "reason"} <= kept.keys()

    spoil({})
    golden, _ = train(tmp_path, "golden")
    assert curve(folder)[:6] == curve(golden)[:6]
    resumed, refusal = train(tmp_path, "n1")  # as if the memory had failed once: the step is good this time
    assert refusal is None and curve(resumed) == curve(golden)
    assert equal(arrays(resumed, 12), arrays(golden, 12))


def test_n2_skip_leaves_the_state_unchanged_and_the_rest_as_a_run_without_that_batch(tmp_path, spoil):
    spoil({7: np.nan})
    folder, refusal = train(tmp_path, "n2", save_every=1, guard=Guard(policy="skip"))
    assert refusal is None
    assert equal(arrays(folder, 6), arrays(folder, 7), but=["step"])
    assert [line["step"] for line in read(folder / "metrics.jsonl") if line.get("skipped")] == [7]
    spoil({})
    golden, _ = train(tmp_path, "golden", save_every=1, guard=Guard(skip=(7,)))
    assert curve(folder, leave=[7]) == curve(golden) and len(curve(golden)) == 11
    assert equal(arrays(folder, 12), arrays(golden, 12))
    plain, _ = train(tmp_path, "plain")
    assert curve(golden)[:6] == curve(plain)[:6] and curve(golden)[6:] != curve(plain)[7:]


@pytest.mark.parametrize("window", [1, 3])
def test_n3_rewind_goes_back_and_never_uses_the_window_of_batches(tmp_path, spoil, window):
    used = spoil({7: np.inf})
    guard = Guard(policy="rewind", window=window)
    folder, refusal = train(tmp_path, "n3", guard=guard)
    assert refusal is None
    events = {event["kind"]: event for event in read(folder / "events.jsonl")}
    assert (events["rewind"]["step"], events["rewind"]["window"], events["redo"]["steps"]) == (7, window, 3)
    since = used[max(i for i, rows in enumerate(used) if rows == tuple(loop.rows_of(RUN, Sized, 4))) :]
    assert len(set(since)) == 8 - window and not {tuple(loop.rows_of(RUN, Sized, 6 + i)) for i in range(window)} & set(
        since
    )
    spoil({})
    golden, _ = train(tmp_path, "golden", guard=Guard(skip=tuple(range(7, 7 + window))))
    assert curve(folder) == curve(golden) and equal(arrays(folder, 12), arrays(golden, 12))


def test_n3_a_spike_of_1e15_is_found_and_its_batch_left_out(tmp_path, spoil):
    long = dataclasses.replace(RUN, loss=Boosted(), steps=76, save_every=20)
    spoil({70: 1e15})
    unwatched, _ = train(tmp_path, "unwatched", long)
    assert float.fromhex(curve(unwatched)[69][1]) > 1e14  # finite, so nothing stops it
    folder, refusal = train(tmp_path, "spike", long, guard=Guard(policy="rewind", sigmas=6))
    assert refusal is None and [e["reason"] for e in read(folder / "events.jsonl") if e["kind"] == "fault"] == [
        "a spike"
    ]
    spoil({})
    golden, _ = train(tmp_path, "golden", long, guard=Guard(sigmas=6, skip=(70,)))
    assert curve(folder) == curve(golden) and equal(arrays(folder, 76), arrays(golden, 76))


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_n4_more_bad_steps_in_a_row_than_the_limit_end_the_run_with_a_finite_state(tmp_path, spoil, policy):
    spoil(dict.fromkeys(range(6, 13), np.nan))
    folder, refusal = train(tmp_path, "n4", guard=Guard(policy=policy, limit=2))
    assert refusal.code == 70 and str(refusal).startswith("step 8:")
    newest = Checkpoints(folder / "checkpoints").latest()
    assert newest == {"skip": 7, "rewind": 4}[policy]
    assert all(np.isfinite(x).all() for x in arrays(folder, newest).values() if x.dtype == np.float32)


def test_n5_a_nan_on_one_device_is_everyones(tmp_path, spoil):
    spoil({7: np.nan}, rows=slice(0, 1))  # one row of sixteen, on one of eight devices
    folder, refusal = train(tmp_path, "n5", guard=Guard(policy="skip"))
    assert refusal is None
    spoil({})
    golden, _ = train(tmp_path, "golden", guard=Guard(skip=(7,)))
    assert curve(folder, leave=[7]) == curve(golden) and equal(arrays(folder, 12), arrays(golden, 12))


def test_looking_for_silent_corruption_changes_no_number(tmp_path):
    plain, _ = train(tmp_path, "plain")
    watched, refusal = train(tmp_path, "watched", guard=Guard(replicas=3, repeat=5))
    assert refusal is None and curve(watched) == curve(plain) and equal(arrays(watched, 12), arrays(plain, 12))


def test_replay_finds_the_layer_of_a_step_that_went_wrong_and_that_a_good_one_did_not(tmp_path, capsys):
    run = dataclasses.replace(RUN, optimizer=AdamW(lr=1e30), clip=0.0, runs=str(tmp_path), name="wild")
    folder, refusal = train(tmp_path, "wild", run)
    step = int(str(refusal).split(":")[0].removeprefix("step "))
    with contextlib.chdir(tmp_path):
        assert replay(run, folder, Processes(), Options(step=step)) == 0
        said = capsys.readouterr().out
        assert f"Its state and its batch are those of faults/{step}.json." in said
        assert "First not finite: the gradient of blocks.1." in said
        assert replay(run, folder, Processes(), Options(step=1)) == 0
        assert "All of it is finite." in capsys.readouterr().out
