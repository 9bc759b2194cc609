"""Every experiment in the folder is listed, imported and type-checked on the cluster it names, with no device."""

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import experiments
import meshes.chips
from llmjax import cli
from llmjax import mesh as meshes_of
from llmjax.train import step as steps
from llmjax.train.program import Program, bytes_per_device, make, resolve

NAMES = sorted(path.stem for path in Path(experiments.__path__[0]).glob("*.py") if path.stem != "__init__")
PARAMETERS = {  # published sizes; GPT-2's vocabulary is padded here, which adds 0.03 %
    "gpt2_124m_h200": 124.44e6,
    "llama_1b_h200": 1.236e9,
    "llama3_8b_h100x8": 8.030e9,
    "llama3_8b_v5p_64": 8.030e9,
    "llama3_8b_v6e_256": 8.030e9,
    "llama3_70b_v5p_128_x2": 70.554e9,
    "llama3_70b_v6e_256": 70.554e9,
    "llama31_405b_v5p_512": 405.853e9,
}


def run_of(name: str):
    return importlib.import_module(f"experiments.{name}").run


@functools.cache
def program_of(name: str) -> Program:
    """The experiment on its cluster as a type: on one device where the cluster is whatever the machine has."""
    run = run_of(name)
    chip = run.mesh.chip or meshes.chips.CPU
    return make(run, meshes_of.abstract_mesh(resolve(run, run.mesh.chips or 1)), chip)


LANGUAGE = [name for name in NAMES if hasattr(run_of(name).model, "vocab")]
ON_CHIPS = [name for name in LANGUAGE if run_of(name).mesh.chip and run_of(name).mesh.chip.memory]


def typed(tree):
    """Shape, dtype and place of every array."""
    return [(x.shape, x.dtype, tuple(x.sharding.spec) if x.sharding else ()) for x in jax.tree.leaves(tree)]


def test_the_experiments_that_everyone_compares_with_are_there():
    assert {"stdlib_tiny", "bench_small", "tutorial_mlp", *PARAMETERS} <= set(NAMES)
    assert set(PARAMETERS) <= set(ON_CHIPS)


def test_every_experiment_is_listed_with_the_first_line_of_its_docstring(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["llmjax", "experiments"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert end.value.code == 0 and list(listed) == NAMES
    for name, line in listed.items():
        assert line == sys.modules[f"experiments.{name}"].__doc__.splitlines()[0]
        assert line.endswith(".")


def test_importing_experiments_and_meshes_touches_no_device_prints_nothing_and_writes_nothing(tmp_path):
    everything = """
        import importlib, pkgutil, experiments, meshes
        for package in (experiments, meshes):
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{package.__name__}.{module.name}")
        import jax
        try:
            jax.devices()
        except RuntimeError as error:
            assert "no_such_platform" in str(error)
        else:
            raise AssertionError("a backend was found, so nothing was tested")
    """
    code = "\n".join(line[8:] for line in everything.splitlines())
    environment = os.environ | {"JAX_PLATFORMS": "no_such_platform", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_whole_step_type_checks_on_its_cluster_and_gives_back_the_state_it_took(name):
    program = program_of(name)
    state, metrics = program.abstract_step()
    assert typed(state) == typed(program.abstract_state())
    assert typed([metrics["loss"], metrics["grad_norm"]]) == [((), jnp.float32, ())] * 2


@pytest.mark.parametrize("name", ON_CHIPS)
def test_parameters_gradients_and_optimizer_fit_a_chip(name):
    program, chip = program_of(name), run_of(name).mesh.chip
    state, batch = program.abstract_state(), program.abstract_batch()
    with program.context():
        gradients = jax.eval_shape(lambda *a: steps.gradients(*a, program.run.loss)[2], state.model, batch)
    parts = {"parameters": state.model, "gradients": gradients, "optimizer": state.opt}
    held = {part: bytes_per_device(tree, program.mesh) for part, tree in parts.items()}
    assert sum(held.values()) < 0.9 * chip.memory, held
    assert held["gradients"] == held["parameters"] > 0  # nothing is whole where its parameter is cut


@pytest.mark.parametrize("name", PARAMETERS)
def test_named_models_have_their_published_sizes(name):
    found = sum(x.size for x in jax.tree.leaves(program_of(name).abstract_state().model))
    assert found == pytest.approx(PARAMETERS[name], rel=5e-4)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_microbatch_leaves_room_for_its_logits_and_attention_scores(name):
    """Both are whole per microbatch today; three float32 copies of each are alive in the backward pass."""
    program, run = program_of(name), run_of(name)
    model, axes = run.model, dict(program.mesh.shape)
    rows = run.batch // program.accumulate // (axes["data"] * axes["fsdp"])
    logits = rows * run.sequence * model.vocab // axes["tensor"] * 4
    scores = rows * model.heads // axes["tensor"] * run.sequence**2 * 4
    state = program.abstract_state()
    held = bytes_per_device((state, state.model), program.mesh)
    assert rows >= 1
    assert held + 3 * max(logits, scores) < run.mesh.chip.memory
