"""What was saved is what comes back, on any mesh; what is not whole is not taken for a checkpoint."""

import functools
import logging
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import Checkpoints, like, named
from llmjax.checkpoint.retention import Retention
from llmjax.errors import DATA, IO, Refused
from llmjax.models import nn
from llmjax.models.llama import Llama
from llmjax.train import step as steps

TINY = Llama(vocab=64, layers=2, width=32, heads=4, kv_heads=4, head_dim=8, ff=64, positions=16)
BUILD = functools.partial(steps.init, TINY.init, optax.adamw(1e-3))


def mesh_of(**sizes) -> jax.sharding.Mesh:
    axes = meshes.Axes(**dict.fromkeys(meshes.AXES, 1) | sizes)
    return meshes.device_mesh(axes, jax.devices()[: int(np.prod(axes.sizes()))])


def state_on(mesh, seed=0):
    with jax.set_mesh(mesh), nn.compute(nn.Compute(layout=layouts.fsdp_tp)):
        return jax.jit(BUILD)(jax.random.key(seed))


def abstract_on(mesh):
    with jax.set_mesh(mesh), nn.compute(nn.Compute(layout=layouts.fsdp_tp)):
        return like(jax.eval_shape(BUILD, jax.random.key(0)), mesh)


def values(tree):
    return {name: np.asarray(x) for name, x in named(tree).items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoint 5 of a state on a (4, 2) mesh, and that state's values."""
    folder, state = tmp_path_factory.mktemp("saved"), state_on(mesh_of(fsdp=4, tensor=2))
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(5, state, dict(step=5, tokens=80))
    return folder, values(state)


@pytest.mark.parametrize("sizes", [dict(fsdp=4, tensor=2), dict(fsdp=2, tensor=4), dict(), dict(fsdp=2)])
def test_a_state_of_mesh_4_2_comes_back_bit_for_bit_on_any_mesh(saved, sizes):
    folder, expected = saved
    mesh = mesh_of(**sizes)
    with Checkpoints(folder) as checkpoints:
        state = checkpoints.restore(5, abstract_on(mesh))
        assert checkpoints.facts(5) == dict(step=5, tokens=80)
    born = named(state_on(mesh))
    for name, x in named(state).items():
        np.testing.assert_array_equal(x, expected[name], err_msg=name)
        assert x.sharding == born[name].sharding, name
    assert set(expected) == set(named(state))


def test_a_part_of_a_state_can_be_read_alone(saved):
    folder, expected = saved
    with Checkpoints(folder) as checkpoints:
        model = checkpoints.restore(5, steps.State((), abstract_on(mesh_of()).model, ())).model
    for name, value in values(model).items():
        np.testing.assert_array_equal(value, expected[f"model.{name}"], err_msg=name)


def test_arrays_are_stored_by_names_a_person_can_read(saved):
    names = set(saved[1])
    assert {"step", "model.embed_VD", "model.blocks.query_DHK", "opt.0.mu.blocks.query_DHK"} <= names


def test_s11_twenty_steps_donated_right_after_a_save_is_begun_leave_it_as_it_was(tmp_path):
    mesh, overwrite = mesh_of(fsdp=8), jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    x = jax.device_put(np.arange(2**22, dtype=np.float32), NamedSharding(mesh, jax.P("fsdp")))
    with jax.set_mesh(mesh), Checkpoints(tmp_path) as checkpoints:
        for step in range(3):
            kept = np.array(x)
            checkpoints.save(step, {"x": x}, {})
            for _ in range(20):
                x = overwrite(x)
            x = x + step
            checkpoints.wait()
            like_x = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}
            np.testing.assert_array_equal(checkpoints.restore(step, like_x)["x"], kept)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    with Checkpoints(tmp_path, Retention(last=2)) as checkpoints:
        for step in (1, 2, 10):
            checkpoints.save(step, {"x": jnp.zeros(3)}, {})
    assert checkpoints.steps() == [2, 10] and checkpoints.latest() == 10


def test_what_is_not_a_whole_checkpoint_is_not_taken_for_one(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"x": jnp.zeros(3)}, {})
    (tmp_path / "99").mkdir()
    (tmp_path / "9").symlink_to(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "12").write_text("a file")
    left = [tmp_path / name for name in ("7.orbax-checkpoint-tmp", "8.unsealed.orbax-checkpoint-tmp", "8.unsealed")]
    for folder in left:  # by a killed process
        folder.mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [3]
        assert all(folder.exists() for folder in left)  # one who only reads deletes nothing
        checkpoints.save(4, {"x": jnp.zeros(3)}, {})
    assert {path.name for path in tmp_path.iterdir()} == {"3", "4", "99", "9", "notes", "12"}


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        ("manifest", r'"state/manifest\.ocdbt": Error decoding manifest: Length in header'),
        ("metadata", "one of its JSON files is damaged: .* line 1 column"),
        ("sharding", '"state/_sharding": Invalid JSON'),
        ("data", r'"state/d/\w+": Requested byte range'),
    ],
    ids=["manifest", "metadata", "sharding", "data"],
)
def test_a_damaged_checkpoint_is_refused_with_its_name_and_the_remedy(tmp_path, harm, why, caplog, capfd):
    state = {"x": jnp.arange(1000.0), "y": jnp.ones(3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {})
        checkpoints.save(4, state, {})
    folder = tmp_path / "4" / "state"
    data = [p for p in folder.rglob("*") if p.is_file() and p.parent.name == "d"]
    files = {"manifest": "manifest.ocdbt", "metadata": "_METADATA", "sharding": "_sharding"}
    for path in data if harm == "data" else [folder / files[harm]]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(Refused, match=rf"/4 cannot be read \(.*{why}.*\): .* step 3\.$") as refused:
            checkpoints.restore(4, jax.eval_shape(lambda: state))
        assert refused.value.code == DATA and len(str(refused.value)) < 500
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert capfd.readouterr().err == ""


def test_another_model_s_checkpoint_is_refused_by_the_array_that_differs(saved):
    abstract = abstract_on(mesh_of())
    wider = {"model.embed_VD": jax.ShapeDtypeStruct((65, 32), jnp.float32, sharding=abstract.step.sharding)}
    with Checkpoints(saved[0]) as checkpoints:
        with pytest.raises(Refused, match=r"model.embed_VD in shape \(64, 32\)"):
            checkpoints.restore(5, wider)
        with pytest.raises(Refused, match=r"model\.more nowhere"):
            checkpoints.restore(5, {"model.more": abstract.step})


def test_a_folder_that_cannot_be_written_is_an_io_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(Refused, match="checkpoint 1 could not be written") as refused:  # noqa: SIM117
        with Checkpoints(tmp_path / "file") as checkpoints:
            checkpoints.save(1, {"x": jnp.zeros(3)}, {})
    assert refused.value.code == IO


FAILED = """
import resource, sys
import jax.numpy as jnp
from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.errors import Refused
def save(folder):
    try:
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(1, {"x": jnp.arange(2**20), "y": jnp.arange(2**20)}, {})
    except Refused as refused:
        print(refused, flush=True)
save(sys.argv[1] + "/file")
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # no file can be longer: it fails as on a full disk
save(sys.argv[1] + "/folder")
"""


def test_a_save_that_failed_ends_in_a_sentence_and_leaves_nothing_that_speaks_later(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", FAILED, str(tmp_path)], **pipes) as child:
        said = [child.stdout.readline() for _ in range(2)]
        more, errors = child.communicate(timeout=60)
    assert more == errors == "" and child.returncode == 0  # a thread left waiting would print its time-out
    assert "checkpoint 1 could not be written" in said[0] and "Not a directory" in said[0]
    assert "checkpoint 1 could not be written" in said[1] and "File too large" in said[1]


KILLED = """
import sys, os, signal, threading
import jax.numpy as jnp
from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.checkpoint.retention import Retention
with Checkpoints(sys.argv[1], Retention(last=3)) as checkpoints:
    for step in range(1, 1000):
        checkpoints.save(step, {"x": jnp.full(2**20, step, jnp.float32)}, {"step": step})
        print(step, flush=True)
"""


@pytest.mark.parametrize("saves", [2, 5])
def test_after_a_kill_in_the_middle_of_a_save_the_newest_whole_checkpoint_is_there(tmp_path, saves):
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    for _ in range(saves):
        child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with Checkpoints(tmp_path) as checkpoints:
        step = checkpoints.newest_verified()
        assert step >= saves - 1
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        x = checkpoints.restore(step, {"x": jax.ShapeDtypeStruct((2**20,), jnp.float32, sharding=here)})["x"]
        assert np.all(np.asarray(x) == step) and checkpoints.facts(step) == {"step": step}
