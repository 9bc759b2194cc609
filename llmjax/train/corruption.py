"""Devices that compute wrongly without a word: copies that should be equal, and a step that is taken twice."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llmjax.checkpoint.checkpoints import named
from llmjax.errors import NON_FINITE, Refused
from llmjax.train import digest


def replicas(tree: Any, mesh: Mesh) -> None:
    """Compares the copies of every leaf on all devices that hold the same part of it; every process calls it.

    Each device digests what it holds, and the digests alone travel.

    Raises:
      Refused: two copies differ, naming the leaf and the device that is alone with its copy, on all processes.
    """
    leaves = named(tree)
    table = np.asarray(_gathered(jax.jit(_per_device)(leaves)))  # [mesh..., leaves]
    devices = mesh.devices.ravel()
    for column, (name, leaf) in enumerate(leaves.items()):
        held = dict(zip(devices, table.reshape(len(devices), -1)[:, column].tolist(), strict=True))
        parts: dict[str, list[jax.Device]] = {}
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            parts.setdefault(str(index), []).append(device)
        for copies in parts.values():
            _compare(name, {device: held[device] for device in copies})


def _compare(name: str, held: dict[jax.Device, int]) -> None:
    count = collections.Counter(held.values())
    if len(count) < 2:
        return
    (usual, times), (_, next_times) = count.most_common(2)
    odd = [device for device, value in held.items() if times == next_times or value != usual]
    which = ", ".join(f"device {device.id} of process {device.process_index}" for device in odd)
    what = f"hold different copies of {name} and none is in the majority"
    if times > next_times:
        what = f"{'hold' if len(odd) > 1 else 'holds'} another copy of {name} than the others"
    raise Refused(
        f"{which} {what}: memory or arithmetic is not to be trusted there, so leave out what is at fault and run the "
        "same command to continue from the last checkpoint.",
        NON_FINITE,
    )


def _per_device(leaves: dict[str, jax.Array]) -> jax.Array:
    """uint32 [mesh..., leaves]: on every device, the digest of what it holds of each leaf."""
    mesh = jax.sharding.get_abstract_mesh()
    everywhere = P(*mesh.axis_names)

    def on_device(leaves):
        found = jnp.stack([jnp.sum(digest.mixed(digest.words(x) + _places(x))) for x in leaves.values()])
        return jnp.reshape(found, (1,) * len(mesh.axis_names) + found.shape)

    specs = {name: jax.typeof(x).sharding.spec for name, x in leaves.items()}
    return jax.shard_map(on_device, in_specs=(specs,), out_specs=everywhere, check_vma=False)(leaves)


def _places(x: jax.Array) -> jax.Array:
    words = digest.words(x)
    return digest.mixed(jax.lax.iota(jnp.uint32, words.size).reshape(words.shape))


def _gathered(table: jax.Array) -> Any:
    return table if jax.process_count() == 1 else multihost_utils.process_allgather(table, tiled=True)


def repeat(step: Callable, state: Any, batch: Any, *, number: int) -> tuple[Any, dict[str, jax.Array]]:
    """`step(state, batch)`, the step of this number, taken twice from equal copies of the state, and compared;
    every process calls it.

    What is returned is one of the two that were compared. Every device is compared with itself, as one that alone
    holds a wrong copy shows in no other. It needs room for another state.

    Raises:
      Refused: the two gave different results, naming the leaves and devices; a third one tells whether it lasts.
    """
    names, first = _held(step(_copy(state), batch))
    result = step(_copy(state), batch)
    second = _held(result)[1]
    if (first == second).all():
        return result
    del result  # before a third one takes its place
    third = _held(step(_copy(state), batch))[1]
    agree = (third == first).all() or (third == second).all()
    wrong = (first != second) | (first != third)  # [devices, leaves]
    differ = [name for name, any_device in zip(names, wrong.any(axis=0), strict=True) if any_device]
    devices = jax.sharding.get_mesh().devices.ravel()
    kind = "transient: the third agrees with one of them" if agree else "persistent: no two agree"
    on = [
        f"device {d.id} of process {d.process_index}" for d, bad in zip(devices, wrong.any(axis=1), strict=True) if bad
    ]
    raise Refused(
        f"step {number}, taken twice from one state, gave different results in {', '.join(differ[:4])}"
        f"{' and others' if len(differ) > 4 else ''} on {', '.join(on) if len(on) < len(devices) else 'all devices'} "
        f"({kind}): a device computes wrongly, so run the same command to continue from the last checkpoint, on other "
        "devices if it comes back.",
        NON_FINITE,
    )


_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def _held(results: tuple[Any, Any]) -> tuple[list[str], np.ndarray]:
    """The names of all leaves, and uint32 [devices, leaves]: the digest of what every device holds of each."""
    leaves = named(dict(zip(("state", "metrics"), results, strict=True)))
    table = np.asarray(_gathered(jax.jit(_per_device)(leaves)))
    return list(leaves), table.reshape(-1, len(leaves))
