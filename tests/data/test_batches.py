"""The batch is a function of the step: the same on any mesh, complete in every epoch, ready in time."""

import hashlib
import json
import textwrap
import threading

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from llmjax.data.batches import order, place, prefetch
from llmjax.data.dataset import ArrayDataset, Synthetic
from llmjax.launch import launch


def sharding_on(**axes):
    devices = np.array(jax.devices()[: int(np.prod(list(axes.values())))]).reshape(tuple(axes.values()))
    mesh = jax.sharding.Mesh(devices, tuple(axes), axis_types=(AxisType.Explicit,) * len(axes))
    return NamedSharding(mesh, jax.P(None, tuple(a for a in axes if a != "tensor")))


def batch_hash(arrays):
    """The global batch, whatever its accumulation: rows in order, names, types and content."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        rows = np.asarray(array).reshape(-1, *array.shape[2:])
        digest.update(f"{name} {rows.dtype} {rows.shape}".encode() + np.ascontiguousarray(rows).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(("size", "batch"), [(1, 1), (7, 7), (64, 8), (50, 16), (10, 24)])
def test_every_epoch_holds_every_row_once(size, batch):
    epochs = 6
    steps = -(-epochs * size // batch)
    rows = np.concatenate([order(step, batch=batch, size=size, seed=3) for step in range(steps)])
    assert rows.dtype == np.int64
    for epoch in range(epochs):
        assert sorted(rows[epoch * size : (epoch + 1) * size]) == list(range(size))
    if size > 8:
        assert len({tuple(rows[epoch * size : (epoch + 1) * size]) for epoch in range(epochs)}) == epochs


def test_order_is_a_pure_function_of_seed_and_step():
    assert order(1000, batch=4, size=100, seed=0).tolist() == [5, 80, 52, 37]
    assert np.array_equal(order(10**9, batch=4, size=10**9, seed=5), order(10**9, batch=4, size=10**9, seed=5))
    seeds = [tuple(order(0, batch=50, size=1000, seed=seed)) for seed in range(-2, 20)]
    assert len(set(seeds)) == 22


def test_batches_of_another_size_walk_the_same_rows():
    rows = [np.concatenate([order(s, batch=b, size=50, seed=1) for s in range(240 // b)]) for b in (2, 16, 40)]
    assert np.array_equal(rows[0], rows[1]) and np.array_equal(rows[0], rows[2])


@pytest.mark.parametrize("step", [0, 5])
def test_the_global_batch_is_the_same_on_any_mesh_and_accumulation(step):
    dataset = Synthetic(vocab=97, rows=100).open(12, "unused")
    rows = order(step, batch=16, size=dataset.size("train"), seed=7)
    expected = batch_hash({k: v[None] for k, v in dataset.examples("train", rows).items()})
    meshes = [{"data": n} for n in (1, 2, 4, 8)] + [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "tensor": 8}]
    for axes in meshes:
        for accumulate in (1, 2):
            placed = place(dataset, "train", rows, accumulate=accumulate, sharding=sharding_on(**axes))
            assert placed["tokens"].shape == (accumulate, 16 // accumulate, 12)
            assert batch_hash(placed) == expected


# Each of several processes writes down a hash of every row that its devices hold.
HASHER = """
    import hashlib, json, pathlib, sys
    import jax, numpy as np
    from jax.sharding import NamedSharding
    from llmjax.data.batches import order, place
    from llmjax.data.dataset import Synthetic
    from llmjax.mesh import Axes, device_mesh
    from llmjax.processes import Processes, start
    from meshes import local
    given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    numbers = {key: int(given[f"--processes.{key}"]) for key in ("count", "index", "devices")}
    devices = start(local.cluster, Processes(given["--processes.coordinator"], **numbers))
    sharding = NamedSharding(device_mesh(Axes(len(devices), 1, 1, 1, 1, 1), devices), jax.P(None, "data"))
    dataset = Synthetic(vocab=97, rows=100).open(12, "unused")
    rows = order(5, batch=16, size=100, seed=7)
    found = {}
    for name, array in place(dataset, "train", rows, accumulate=2, sharding=sharding).items():
        for shard in array.addressable_shards:
            for a, row in np.ndindex(shard.data.shape[:2]):
                number = a * 8 + shard.index[1].start + row
                found[f"{name} {number}"] = hashlib.sha256(np.asarray(shard.data)[a, row].tobytes()).hexdigest()
    pathlib.Path(f"rows_{numbers['index']}.json").write_text(json.dumps(found))
"""


@pytest.mark.timeout(120)
def test_two_processes_hold_the_rows_of_one(tmp_path, monkeypatch):
    (tmp_path / "hasher.py").write_text(textwrap.dedent(HASHER))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert launch(2, 2, [], tmp_path, module="hasher") == 0
    first, second = (json.loads((tmp_path / f"rows_{index}.json").read_text()) for index in (0, 1))
    assert len(first) == len(second) == 3 * 8 and not first.keys() & second.keys()
    dataset = Synthetic(vocab=97, rows=100).open(12, "unused")
    whole = dataset.examples("train", order(5, batch=16, size=100, seed=7))
    assert first | second == {
        f"{name} {row}": hashlib.sha256(array[row].tobytes()).hexdigest()
        for name, array in whole.items()
        for row in range(16)
    }


def test_arrays_of_any_further_dims_are_placed_as_asked():
    arrays = {"x": np.arange(8 * 6.0).reshape(8, 2, 3), "label": np.arange(8)}
    dataset = ArrayDataset(arrays, arrays)
    sharding = sharding_on(data=2, fsdp=2)
    rows = np.array([7, 0, 1, 2, 6, 5, 4, 3])
    placed = place(dataset, "heldout", rows, accumulate=2, sharding=sharding)
    assert np.array_equal(placed["x"], arrays["x"][rows].reshape(2, 4, 2, 3))
    assert np.array_equal(placed["label"], rows.reshape(2, 4))
    assert all(array.sharding.is_equivalent_to(sharding, array.ndim) for array in placed.values())
    assert placed["x"].addressable_shards[0].data.shape == (2, 1, 2, 3)


def test_each_row_is_read_once_however_many_devices_share_it():
    class Counting(ArrayDataset):
        def examples(self, split, rows):
            read.extend(rows.tolist())
            return super().examples(split, rows)

    read = []
    dataset = Counting({"x": np.arange(20)}, {})
    rows = np.arange(4, 20)
    place(dataset, "train", rows, accumulate=2, sharding=sharding_on(data=2, tensor=4))
    assert sorted(read) == rows.tolist()


def test_prefetch_gives_every_step_in_order():
    got = list(prefetch(lambda step: step * step, 3, 9))
    assert [(step, made) for step, made, _ in got] == [(step, step * step) for step in range(3, 9)]
    assert all(waited >= 0 for *_, waited in got)
    assert list(prefetch(lambda step: step, 5, 5)) == []


def test_b4_how_far_ahead_batches_are_made_changes_none_of_them():
    def made(depth, start):
        return [
            batch for _, batch, _ in prefetch(lambda s: order(s, batch=4, size=16, seed=1).tolist(), start, 9, depth)
        ]

    assert made(1, 0) == made(2, 0) == made(4, 0) and all(made(depth, 5) == made(2, 0)[5:] for depth in (1, 2, 4))


def test_prefetch_works_ahead_by_its_depth_and_no_more():
    made, third = [], threading.Event()

    def make(step):
        made.append(step)
        if step == 2:
            third.set()
        return step

    batches = prefetch(make, 0, 100, depth=2)
    next(batches)
    assert third.wait(10)  # made while nobody asks for it
    batches.close()
    assert made == [0, 1, 2]


def test_an_error_surfaces_at_its_step():
    def make(step):
        if step == 2:
            raise ValueError("no such row")
        return step

    batches = prefetch(make, 0, 10)
    assert [next(batches)[0], next(batches)[0]] == [0, 1]
    with pytest.raises(ValueError, match="no such row"):
        next(batches)


def test_closing_ends_the_thread():
    batches = prefetch(lambda step: step, 0, 1000)
    next(batches)
    assert [t for t in threading.enumerate() if t.name.startswith("batches")]
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]
