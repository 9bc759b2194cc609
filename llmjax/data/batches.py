"""The batch of a step: which rows, where they go, and having them ready in time.

The rows depend on the seed and the step alone, never on the mesh, the processes or the time. So the data needs no
checkpoint but the step's number.
"""

import concurrent.futures
import hashlib
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding

from llmjax.data.dataset import Dataset
from llmjax.errors import DATA, IO, Refused

Made = TypeVar("Made")


def order(step: int, *, batch: int, size: int, seed: int, ranked: Sequence[int] | None = None) -> np.ndarray:
    """The rows of the global batch at `step` (from 0): int64 [batch].

    The batches follow one another through a shuffle of all `size` rows, then through another: within an epoch no row
    comes twice and none is left out. A batch may span two epochs. Finding a row costs the same anywhere. `ranked` rows
    take the place of the shuffle, in every epoch.
    """
    return np.array([row_at(step * batch + i, size, seed, ranked) for i in range(batch)], np.int64)


def row_at(position: int, size: int, seed: int | str, ranked: Sequence[int] | None = None) -> int:
    """The row at a position of the endless walk through shuffles of all `size` rows, or through `ranked` rows."""
    if ranked is not None:
        return int(ranked[position % size])
    from grain.experimental import index_shuffle  # half a second of imports that only training needs

    epoch, index = divmod(position, size)
    return index_shuffle(index, max_index=size - 1, seed=_epoch_seed(seed, epoch), rounds=4)


def ranked(dataset: Dataset) -> Sequence[int] | None:
    """The rows in the order that a dataset has of its own; None: it is shuffled."""
    return getattr(dataset, "ranked", None)  # most have none, nor have those of experiments


def _epoch_seed(seed: int | str, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:4])


def place(
    dataset: Dataset, split: str, rows: np.ndarray, *, accumulate: int, sharding: NamedSharding
) -> dict[str, jax.Array]:
    """The global batch of `rows` on its devices: each array of an example becomes [A, B/A, ...].

    Row i of the batch lands at [i // (B/A), i % (B/A)]. A process reads the rows of its own devices and no others,
    each once. `sharding` cuts the second dim, as `P(None, axes)`; further dims stay whole.

    Raises:
      Refused: the dataset failed at these rows (code 74 where it could not read, else 65).
    """
    rows_AB = np.asarray(rows).reshape(accumulate, -1)
    width = rows_AB.shape[1]
    cuts = sharding.addressable_devices_indices_map(rows_AB.shape).values()
    mine = np.unique(np.concatenate([np.arange(width)[columns] for _, columns in cuts]))
    local = _examples(dataset, split, rows_AB[:, mine].ravel())
    return {
        name: _global(values.reshape(accumulate, len(mine), *values.shape[1:]), mine, width, sharding)
        for name, values in local.items()
    }


def _examples(dataset: Dataset, split: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    try:
        return dataset.examples(split, rows)
    except Refused:
        raise
    except (Exception, SystemExit) as error:  # one that leaves must not look as if all had been done
        where = traceback.extract_tb(error.__traceback__)[-1]
        shown = ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        why = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise Refused(
            f"rows {shown} of the {split} data cannot be made ({why}, at {where.filename}:{where.lineno}): put that "
            "right, then run the same command to continue.",
            IO if isinstance(error, OSError) else DATA,
        ) from error


def _global(local: np.ndarray, mine: np.ndarray, width: int, sharding: NamedSharding) -> jax.Array:
    """Puts `local` [A, len(mine), ...], the columns `mine` out of `width`, on this process's devices."""

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[1].indices(width)
        first = np.searchsorted(mine, start)
        return local[:, first : first + stop - start]

    shape = (local.shape[0], width, *local.shape[2:])
    dtype = jax.dtypes.canonicalize_dtype(local.dtype)  # NumPy's 64-bit defaults become 32-bit, as in jnp.asarray
    local = local.astype(dtype, copy=False)
    return jax.make_array_from_callback(shape, sharding, shard, dtype=dtype)


def prefetch(make: Callable[[int], Made], start: int, stop: int, depth: int = 2) -> Iterator[tuple[int, Made, float]]:
    """Makes the batches of steps `start` to `stop - 1` ahead in a thread, at most `depth` of them, from now on.

    Yields (step, batch, milliseconds waited for it). An error in `make` is raised here, at its step. Closing the
    iterator ends the thread after the batch it is making.
    """
    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches")
    ahead = deque(pool.submit(make, step) for step in range(start, min(stop, start + depth)))
    return _consume(pool, ahead, make, start, stop)


def _consume(pool, ahead, make, start, stop):
    try:
        for step in range(start, stop):
            began = time.perf_counter()
            try:
                batch = ahead.popleft().result()
            except Refused as refusal:
                raise Refused(f"step {step + 1}: {refusal}", refusal.code) from refusal
            waited = 1e3 * (time.perf_counter() - began)
            if (further := step + len(ahead) + 1) < stop:
                ahead.append(pool.submit(make, further))
            yield step, batch, waited
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
