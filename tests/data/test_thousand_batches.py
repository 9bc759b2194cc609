"""The first 1,000 batches of a mixture are the same on any mesh, processes and workers, and after a kill."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest

from llmjax.data import mixture
from llmjax.data.batches import prefetch
from llmjax.data.build import Build, build
from llmjax.launch import launch

STEPS, BATCH, SEQUENCE = 1000, 8, 32

# A digest of every row of every batch that the devices of this process hold, one line per step.
HASHES = """
    import hashlib, json, sys
    import jax, numpy as np
    from jax.sharding import NamedSharding
    from llmjax.data import mixture
    from llmjax.data.batches import place
    from llmjax.data.mixture import Mixture, Phase
    from llmjax.data.stored import Store
    from llmjax.mesh import Axes, device_mesh
    from llmjax.processes import Processes, start
    from meshes import local

    def opened(root):
        stores = Store(f"{root}/a", "best_fit", segments=True), Store(f"{root}/b", segments=True, order="short_first")
        return Mixture(stores, (0.7, 0.3), (Phase(600, (0.2, 0.8)),)).open(32, root + "/cache")

    def digests(dataset, step, devices):
        sharding = NamedSharding(device_mesh(Axes(len(devices), 1, 1, 1, 1, 1), devices), jax.P(None, "data"))
        rows = mixture.order(dataset, step, batch=8, seed=3)
        found = {}
        for name, array in sorted(place(dataset, "train", rows, accumulate=1, sharding=sharding).items()):
            for shard in array.addressable_shards:
                for n, row in enumerate(np.asarray(shard.data)[0]):
                    found.setdefault(n + (shard.index[1].start or 0), hashlib.sha256()).update(row.tobytes())
        return {row: digest.hexdigest() for row, digest in sorted(found.items())}

    if __name__ == "__main__":
        given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
        index = int(given.get("--processes.index", 0))
        if "--processes.count" in given:
            numbers = {key: int(given[f"--processes.{key}"]) for key in ("count", "index", "devices")}
            devices = start(local.cluster, Processes(given["--processes.coordinator"], **numbers))
        else:
            devices = jax.devices()[:1]
        dataset = opened(given["--root"])
        with open(f"{given['--out']}_{index}", "w") as file:
            for step in range(int(given["--first"]), 1000):
                file.write(json.dumps(digests(dataset, step, devices)) + "\\n")
                file.flush()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two stores, and a module that hashes batches of their mixture."""
    made = tmp_path_factory.mktemp("thousand")
    lengths = np.random.default_rng(0).geometric(1 / 60, 3000)
    for part in range(8):
        texts = [chr(97 + n % 26) * int(lengths[n]) + str(n) for n in range(part, 3000, 8)]
        (made / f"{part}.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    for name, parts in (("a", range(4)), ("b", range(4, 8))):
        stored(made, made / name, parts, 1)
    (made / "hashes.py").write_text(textwrap.dedent(HASHES))
    return made


def stored(root, out, parts, workers):
    source = tuple(str(root / f"{part}.jsonl") for part in parts)
    return build(Build(source, heldout=0.05), out, workers, lambda _: None)


@pytest.fixture(scope="module")
def hashes(root):
    sys.path.insert(0, str(root))
    try:
        import hashes

        yield hashes
    finally:
        sys.path.remove(str(root))


@pytest.fixture(scope="module")
def expected(root, hashes):
    """The digest of all, straight from the dataset."""
    dataset = hashes.opened(str(root))
    whole = hashlib.sha256()
    for step in range(STEPS):
        batch = dataset.examples("train", mixture.order(dataset, step, batch=BATCH, seed=3))
        for row in range(BATCH):
            digest = hashlib.sha256()
            for _, array in sorted(batch.items()):
                digest.update(array[row].tobytes())
            whole.update(digest.hexdigest().encode())
    assert dataset.sources[0].size("train") < STEPS * BATCH  # more than an epoch
    return whole.hexdigest()


def total(lines):
    """The digest of all, of the lines that one process wrote, or of those that two wrote together."""
    whole = hashlib.sha256()
    for line in lines:
        assert sorted(map(int, line)) == list(range(BATCH))
        for row in sorted(line, key=int):
            whole.update(line[row].encode())
    return whole.hexdigest()


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_on_any_number_of_devices(root, hashes, expected, count):
    dataset, devices = hashes.opened(str(root)), jax.devices()[:count]
    assert total(hashes.digests(dataset, step, devices) for step in range(STEPS)) == expected


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.timeout(300)
def test_on_two_processes(root, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(root))
    words = ["--root", str(root), "--out", str(tmp_path / "two"), "--first", "0"]
    assert launch(2, 2, words, tmp_path, module="hashes") == 0
    first, second = written(tmp_path / "two_0"), written(tmp_path / "two_1")
    assert len(first) == STEPS and not first[0].keys() & second[0].keys()
    assert total(a | b for a, b in zip(first, second, strict=True)) == expected


def test_before_and_after_a_kill(root, expected, tmp_path):
    def started(first, out):
        words = [str(root / "hashes.py"), "--root", str(root), "--out", str(tmp_path / out), "--first", str(first)]
        return subprocess.Popen([sys.executable, *words], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})

    before, until = started(0, "before"), time.monotonic() + 60
    while before.poll() is None and time.monotonic() < until:
        if (tmp_path / "before_0").exists() and len(written(tmp_path / "before_0")) >= 100:
            break
        time.sleep(0.01)
    before.send_signal(signal.SIGKILL)
    assert before.wait() == -signal.SIGKILL
    lines = written(tmp_path / "before_0")
    assert 100 <= len(lines) < STEPS
    assert started(len(lines), "after").wait() == 0
    assert total(lines + written(tmp_path / "after_0")) == expected


def test_with_four_workers_that_built_the_stores(root, hashes, expected, tmp_path):
    for name, parts in (("a", range(4)), ("b", range(4, 8))):
        stored(root, tmp_path / name, parts, 4)
    dataset, one = hashes.opened(str(tmp_path)), jax.devices()[:1]
    assert total(hashes.digests(dataset, step, one) for step in range(STEPS)) == expected


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_however_far_ahead_batches_are_made(root, hashes, expected, depth):
    dataset, one = hashes.opened(str(root)), jax.devices()[:1]
    made = prefetch(lambda step: hashes.digests(dataset, step, one), 0, STEPS, depth)
    assert total(batch for _, batch, _ in made) == expected
