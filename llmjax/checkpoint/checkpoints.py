"""Checkpoints of a run: written by Orbax in the background, each array in shards, read back on any mesh.

A checkpoint is a folder named by its step. Orbax writes it under another name and renames it when it is whole, so a
folder with a plain number is complete whenever the process was killed. Arrays are stored by readable names, such as
`model.blocks.query_DHK`, free of how the state is nested in this version of any library.
"""

import contextlib
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from llmjax.errors import DATA, IO, Refused

TEMPORARY = ".orbax-checkpoint-tmp"  # part of the name of a folder that Orbax has not finished


class Checkpoints:
    """The checkpoints in a folder, of which the newest `keep` stay; a resource, to be used in a `with`.

    With several processes, all of them call every method, at the same point.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = Path(folder).absolute(), keep
        self._writing: tuple[int, Any] | None = None

    def __enter__(self) -> "Checkpoints":
        if jax.process_index() == 0 and self.folder.is_dir():
            for unfinished in self.folder.glob(f"*{TEMPORARY}*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        return self

    def __exit__(self, kind, error, trace) -> None:
        with contextlib.nullcontext() if error is None else contextlib.suppress(Refused):  # the first failure counts
            self.wait()

    def steps(self) -> list[int]:
        """The steps with a complete checkpoint, oldest first. Other files and folders are left alone."""
        if not self.folder.is_dir():
            return []
        found = (path for path in self.folder.iterdir() if path.name.isdecimal() and str(int(path.name)) == path.name)
        return sorted(int(path.name) for path in found if (path / "_CHECKPOINT_METADATA").is_file())

    def latest(self) -> int | None:
        """The newest of `steps`."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Starts to write `state`, with `facts` (JSON) inside; waits only for the checkpoint before.

        The arrays may be donated as soon as this returns.

        Raises:
          Refused: this checkpoint, or the one before, could not be written.
        """
        import orbax.checkpoint.experimental.v1 as ocp  # a second and a half of imports

        self.wait()
        with self._failures(step):
            path = self.folder / str(step)
            self.folder.mkdir(parents=True, exist_ok=True)  # Orbax's own try would fail in a thread, minutes later
            self._writing = step, ocp.save_async(path, named(state), overwrite=True, custom_metadata=facts)

    def wait(self) -> None:
        """Returns when everything saved is on disk, and removes checkpoints beyond `keep`."""
        if self._writing is None:
            return
        (step, response), self._writing = self._writing, None
        with self._failures(step):
            response.result()
        if jax.process_index() == 0:
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.folder / str(old), ignore_errors=True)

    def facts(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays.

        Raises:
          Refused: the checkpoint cannot be read.
        """
        return dict(self._metadata(step).custom_metadata or {})

    def restore(self, step: int, like: Any) -> Any:
        """The arrays of a checkpoint in the structure, and on the devices, of `like`; see `like`.

        `like` may be a part of what was saved: nothing else is read.

        Raises:
          Refused: the checkpoint cannot be read, or holds other arrays.
        """
        import orbax.checkpoint.experimental.v1 as ocp

        wanted, found = named(like), self._metadata(step).metadata
        for name, leaf in wanted.items():
            if name not in found or tuple(found[name].shape) != tuple(leaf.shape):
                holds = f"in shape {tuple(found[name].shape)}" if name in found else "nowhere"
                raise Refused(
                    f"checkpoint {self.folder / str(step)} holds {name} {holds}, and this model needs it in shape "
                    f"{tuple(leaf.shape)}: continue with the model that wrote it, or start afresh with another --name.",
                    DATA,
                )
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        try:
            with context, _quiet():
                arrays = ocp.load(self.folder / str(step), wanted)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
            raise self._broken(step, error) from error
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])

    def _metadata(self, step: int):
        import orbax.checkpoint.experimental.v1 as ocp

        try:
            with _quiet():
                found = ocp.metadata(self.folder / str(step))
                if found.metadata is None:  # Orbax only warns of what it could not read
                    raise ValueError("its list of arrays is damaged")
            return found
        except Exception as error:
            raise self._broken(step, error) from error

    def _broken(self, step: int, error: Exception) -> Refused:
        path, others = self.folder / str(step), [s for s in self.steps() if s != step]
        remedy = (
            f"delete that folder to continue from step {others[-1]}" if others else "start afresh with another --name"
        )
        return Refused(f"checkpoint {path} cannot be read ({first_line(error)}): {remedy}.", DATA)

    @contextlib.contextmanager
    def _failures(self, step: int):
        try:
            yield
        except Exception as error:
            raise Refused(
                f"checkpoint {step} could not be written to {self.folder} ({first_line(error)}): make room or give a "
                f"folder that can be written with --runs, then run the same command to continue.",
                IO,
            ) from error


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name, in the tree's order; the `value` inside an nnx.Param goes without saying."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf for path, leaf in leaves
    }
    assert len(names) == len(leaves), "two arrays of the state have one name"
    return names


def like(tree: Any, mesh: Mesh) -> Any:
    """Shapes, dtypes and the places on a real mesh of an abstract state, as `Checkpoints.restore` wants them."""

    def place(x):
        spec = x.sharding.spec if x.sharding is not None else jax.P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While Orbax reads. When an array cannot be read, one sentence of ours says it, not Orbax and its helpers too.

    Orbax warns; it also leaves the other reads behind, and their tracebacks may come until the process ends.
    """
    log, hook = logging.getLogger("absl"), sys.unraisablehook
    level = log.level
    log.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda shown: None if "Event loop is closed" in str(shown.exc_value) else hook(shown)
    try:
        yield
    except Exception:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise
    finally:
        log.setLevel(level)
    sys.unraisablehook = hook


def first_line(error: BaseException) -> str:
    """The beginning of an error's text."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
