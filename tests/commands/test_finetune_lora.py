"""A small real run with adapters: they learn, the weights stay, and merged they are the same model."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from place import arrays, curve, losses
from tuned import MODEL, StopAfter

from llmjax import cli
from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import Checkpoints, like, named
from llmjax.commands.train import train
from llmjax.data.dataset import Synthetic
from llmjax.errors import Refused
from llmjax.interop import folder as interop
from llmjax.mesh import Axes
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import Constant
from llmjax.run import LoRA, Run
from llmjax.train.display import Display
from llmjax.train.loss import NextToken
from llmjax.train.program import Program, make, resolve
from llmjax.train.resume import read_state, read_weights
from meshes import chips, cpu8

QUIET = Display(quiet=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Run:
    run = Run(
        model=MODEL, data=Synthetic(vocab=256, rows=512), optimizer=AdamW(lr=3e-3, schedule=Constant()),
        loss=NextToken(), mesh=cpu8.cluster, layout=layouts.fsdp, steps=4, batch=16, sequence=32, accumulate=1,
        dtype="float32", name="base", runs=str(tmp_path_factory.mktemp("lora")),
    )  # fmt: skip
    assert train(run, display=QUIET) == 0
    return run


@pytest.fixture(scope="module")
def tuned(base) -> Run:
    run = dataclasses.replace(
        base, name="tuned", weights=str(base.folder()), lora=LoRA(rank=8), steps=30, save_every=15,
        optimizer=AdamW(lr=2e-2, schedule=Constant()), layout=layouts.fsdp_tp, axes=Axes(fsdp=4, tensor=2),
    )  # fmt: skip
    assert train(run, display=QUIET) == 0
    return run


def bytes_of(run: Run) -> int:
    newest = Checkpoints(run.folder() / "checkpoints").latest()
    return sum(p.stat().st_size for p in (run.folder() / "checkpoints" / str(newest)).rglob("*") if p.is_file())


def test_the_loss_falls_and_adapters_alone_are_saved(tuned, base):
    found = losses(tuned.folder())[:, 0]
    assert found[-1] < 0.8 * found[0]
    saved, before = arrays(tuned.folder()), arrays(base.folder())
    model = {name for name in saved if name.startswith("model.")}
    assert model == {
        f"model.blocks.{name}.{factor}"
        for name, factors in {
            "query_DHK": ("down_DR", "up_RHK"), "key_DGK": ("down_DR", "up_RGK"), "value_DGK": ("down_DR", "up_RGK"),
            "out_HKD": ("down_HKR", "up_RD"), "gate_DF": ("down_DR", "up_RF"), "up_DF": ("down_DR", "up_RF"),
            "down_FD": ("down_FR", "up_RD"),
        }.items()
        for factor in factors
    }  # fmt: skip
    held = {prefix: sum(x.size for name, x in saved.items() if name.startswith(prefix)) for prefix in ("model", "opt")}
    assert held["opt"] <= 2 * held["model"] + 8  # two averages, and counts
    assert sum(x.nbytes for x in saved.values()) < sum(x.nbytes for x in before.values()) / 2
    assert bytes_of(tuned) < bytes_of(base)


def program_of(run: Run) -> Program:
    devices = jax.devices()
    return make(run, meshes.device_mesh(resolve(run, len(devices)), devices), chips.CPU)


@pytest.fixture(scope="module")
def held(tuned):
    """(program, state, the merged model) of the newest checkpoint."""
    program = program_of(tuned)
    with program.context(), Checkpoints(tuned.folder() / "checkpoints") as checkpoints:
        step = checkpoints.newest_verified()
        return program, read_state(program, checkpoints, step), read_weights(program, checkpoints, step)


def test_the_base_is_bit_identical_and_the_merged_model_is_that_with_adapters(held, base):
    program, state, merged = held
    before = arrays(base.folder())
    for name, x in named(state.frozen).items():
        assert np.asarray(x).tobytes() == before[f"model.{name}"].tobytes(), name
    with program.context():
        tokens = jnp.arange(8 * 32).reshape(8, 32) % 256
        logits = jax.jit(lambda model: model(tokens))
        apart, one, without = (np.asarray(logits(m)) for m in (program.whole(state), merged, state.frozen))
    np.testing.assert_allclose(one, apart, atol=2e-5)
    assert np.abs(without - apart).max() > 0.1


def test_a_run_that_was_stopped_has_the_curve_of_one_that_was_not(tuned):
    stopped = dataclasses.replace(tuned, name="stopped")
    assert train(stopped, notice=StopAfter(9), display=QUIET) == 75
    assert train(stopped, display=QUIET) == 0
    assert curve(stopped.folder()) == curve(tuned.folder())
    assert all(np.array_equal(x, arrays(tuned.folder())[name]) for name, x in arrays(stopped.folder()).items())


def test_what_is_exported_is_the_merged_model_and_nothing_else(tuned, held, tmp_path, monkeypatch, capsys):
    def command(line: str) -> str:
        monkeypatch.setattr(sys, "argv", ["llmjax", *line.split()])
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        assert end.value.code == 0, shown.err
        return shown.out

    assert "read back and found the same" in command(f"export {tuned.folder()} {tmp_path / 'out'} --mesh cpu8")
    program, _, merged = held
    found = interop.read(tmp_path / "out")
    loaded = found.load(like(program.abstract_model(), program.mesh))
    for (name, x), y in zip(named(merged).items(), named(loaded).values(), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=1e-6, err_msg=name)


def test_a_base_that_has_changed_is_refused(tuned, base, tmp_path):
    other = dataclasses.replace(tuned, name="moved", steps=2, save_every=0)
    assert train(other, display=QUIET) == 0
    facts = Checkpoints(other.folder() / "checkpoints").facts(2)
    assert facts["base"]["path"] == str(base.folder()) and len(facts["base"]["digest"]) == 32
    longer = dataclasses.replace(base, name="longer", seed=1, steps=1)
    assert train(longer, display=QUIET) == 0
    kept = base.folder().rename(tmp_path / "kept")
    try:
        longer.folder().rename(base.folder())
        program = program_of(other)
        with program.context(), Checkpoints(other.folder() / "checkpoints") as checkpoints:
            for read in (read_state, read_weights):
                with pytest.raises(
                    Refused, match=r"base are not those that checkpoint 2 of .*moved was trained beside"
                ):
                    read(program, checkpoints, 2)
    finally:
        base.folder().rename(tmp_path / "longer")
        kept.rename(base.folder())
