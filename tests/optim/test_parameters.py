"""Parameters in bfloat16 take half the memory and learn what float32 ones do."""

import dataclasses
import functools
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import Checkpoints, named
from llmjax.checks import check
from llmjax.errors import Refused
from llmjax.layout import Pipeline
from llmjax.mesh import Axes
from llmjax.models.llama import Llama
from llmjax.models.mixtral import Mixtral
from llmjax.optim import parameters
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedule_free import ScheduleFreeAdamW
from llmjax.optim.schedules import Constant
from llmjax.run import DiLoCo, Run
from llmjax.train import step as steps
from llmjax.train.between import decisive
from llmjax.train.loss import NextToken
from llmjax.train.program import make, resolve
from llmjax.train.resume import restore
from meshes import chips, cpu8

TEXT = np.frombuffer((Path(__file__).parents[2] / "LICENSE").read_bytes(), np.uint8).astype(np.int32)
MODEL = Llama(vocab=128, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ff=64, positions=16)
RUN = Run(
    model=MODEL, data=None, optimizer=AdamW(lr=1e-3, schedule=Constant(0.1)), loss=NextToken(), mesh=cpu8.cluster,
    batch=16, sequence=16, steps=150, accumulate=1, dtype="float32", parameters="bfloat16",
)  # fmt: skip
MIXTRAL = Mixtral(vocab=128, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ff=64, positions=16, router="sigmoid")


def trained(run: Run, devices: int, count: int, state=None, start: int = 0) -> tuple[np.ndarray, steps.State]:
    """(losses, the state) of so many steps on the licence's text, from the first or from a state."""
    program, losses = make(run, meshes.device_mesh(resolve(run, devices), jax.devices()[:devices]), chips.CPU), []
    shape = (program.accumulate, 16 // program.accumulate, 17)
    with program.context():
        state = state or program.init(jax.random.key(0))
        for step in range(start, count):
            starts = np.random.default_rng(step).integers(0, len(TEXT) - 17, 16)
            rows = np.stack([TEXT[start : start + 17] for start in starts]).reshape(shape)
            batch = dict(tokens=rows[..., :-1], targets=rows[..., 1:], weights=np.ones(rows[..., 1:].shape, np.float32))
            state, metrics = program.step(state, jax.device_put(batch, program.batch_sharding()))
            losses.append(float(metrics["loss"]))
    return np.array(losses), state


@functools.cache
def reached(parameters: str) -> float:
    """Loss at the end of the run on one device."""
    return trained(dataclasses.replace(RUN, layout=layouts.dp, parameters=parameters), 1, RUN.steps)[0][-25:].mean()


def test_a_run_reaches_the_loss_of_float32_parameters_and_falls_behind_where_steps_round_to_the_nearest(monkeypatch):
    expected, found = reached("float32"), reached("bfloat16")
    assert found == pytest.approx(expected, rel=0.005)

    def to_the_nearest(model, updates, _):
        return optax.apply_updates(model, updates)

    monkeypatch.setattr(steps, "moved", to_the_nearest)
    assert reached.__wrapped__("bfloat16") > 1.01 * expected


def test_steps_of_a_hundredth_of_what_bfloat16_tells_move_a_weight_as_far_as_they_add_up_to():
    params, updates = {"kernel_DF": jnp.ones((64, 64), jnp.bfloat16)}, {"kernel_DF": jnp.full((64, 64), 2.0**-7 / 100)}
    end = jax.lax.scan(lambda w, step: (parameters.moved(w, updates, step), None), params, jnp.arange(300))[0]
    assert end["kernel_DF"].dtype == jnp.bfloat16
    assert np.mean(np.float32(end["kernel_DF"])) == pytest.approx(1 + 3 * 2.0**-7, rel=1e-3)
    assert optax.apply_updates(params, updates)["kernel_DF"].max() == 1


@functools.cache
def on_one_device(model) -> np.ndarray:
    return trained(dataclasses.replace(RUN, layout=layouts.dp, model=model), 1, 10)[0]


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("fsdp", {}),
        ("fsdp_tp_sp", dict(accumulate=2)),
        ("fsdp", dict(loss_chunk=4)),
        ("fsdp_pp", {}),
        ("fsdp_pp", dict(pipeline=Pipeline("1f1b"))),
        ("fsdp_ep", dict(model=MIXTRAL)),
    ],
    ids=str,
)
def test_the_numbers_are_those_of_one_device_on_every_mesh(layout, changes):
    one = on_one_device(changes.get("model", MODEL))
    eight, state = trained(dataclasses.replace(RUN, layout=layouts.preset(layout), **changes), 8, len(one))
    assert one[-1] < 0.97 * one[0], "it does not learn, so the losses say nothing"
    np.testing.assert_allclose(eight, one, rtol=2e-4)
    for path, x in jax.tree_util.tree_leaves_with_path(state.model):
        vector = any(word in jax.tree_util.keystr(path) for word in ("scale", "bias"))
        assert x.dtype == (jnp.float32 if vector else jnp.bfloat16), path
    assert {x.dtype for x in jax.tree.leaves(state.opt)} == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_gradients_of_microbatches_add_up_in_float32():
    program = make(RUN, meshes.device_mesh(resolve(RUN, 1), jax.devices()[:1]), chips.CPU)
    rows = np.stack([TEXT[i * 97 :][:17] for i in range(64)]).reshape(64, 1, 17)
    batch = dict(tokens=rows[..., :-1], targets=rows[..., 1:], weights=np.ones((64, 1, 16), np.float32))
    with program.context():
        model = jax.jit(lambda key: parameters.stored(MODEL.init(key)))(jax.random.key(0))
        gradient = jax.jit(lambda model: steps.gradients(model, batch, NextToken())[2])
        found, exact = map(named, (gradient(model), gradient(parameters.widened(model))))
    for name, grad in exact.items():
        assert found[name].dtype == jnp.float32
        off = np.linalg.norm(found[name] - grad) / np.linalg.norm(grad)
        assert off < 1e-3, f"{name} is off by {off}"  # a sum of 64 in bfloat16 would be by 1 %


def test_a_resumed_run_has_the_same_bits_and_no_checkpoint_of_other_parameters_is_taken_for_its_own(tmp_path):
    run = dataclasses.replace(RUN, layout=layouts.fsdp)
    unbroken, before = trained(run, 8, 6)[1], trained(run, 8, 3)[1]
    wide = dataclasses.replace(run, parameters="float32")
    facts = dict(run=decisive(run), watched=True)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, before, facts)
        checkpoints.wait()
        ledger = types.SimpleNamespace(checkpoints=checkpoints, records=None, display=types.SimpleNamespace(say=print))
        for_8 = meshes.device_mesh(resolve(run, 8), jax.devices())
        dataset = types.SimpleNamespace(fingerprint="same")
        state, step = restore(make(run, for_8, chips.CPU), dataset, ledger)
        with pytest.raises(Refused, match=r"checkpoint 3 .* another config .* differs in parameters"):
            restore(make(wide, for_8, chips.CPU), dataset, ledger)
    resumed = trained(run, 8, 6, state, step)[1]
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(unbroken), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(parameters="float16"), "parameters is 'float16': give one of float32, bfloat16."),
        (dict(local=DiLoCo(every=5)), "parameters is bfloat16, but local.every is 5: .* use float32, or 0"),
        (dict(optimizer=ScheduleFreeAdamW()), "parameters is bfloat16, but ScheduleFreeAdamW keeps .*: use float32"),
    ],
)
def test_what_would_lose_small_steps_is_refused(changes, message):
    with pytest.raises(Refused, match=f"^{message}"):
        check(dataclasses.replace(RUN, **changes), Axes(1, 1, 1, 1, 1, 1), 1)
