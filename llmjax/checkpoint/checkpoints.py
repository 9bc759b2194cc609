"""Checkpoints of a run: written by Orbax in the background, each array in shards, read back on any mesh.

A checkpoint is a folder named by its step. Orbax writes it under another name and renames it when it is whole, so a
folder with a plain number is complete whenever the process was killed. Arrays are stored by readable names, such as
`model.blocks.query_DHK`, free of how the state is nested in this version of any library.
"""

import contextlib
import json
import logging
import re
import shutil
import sys
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
        self._log: logging.Logger | None = None
        self._logged: list[BaseException] = []

    def __enter__(self) -> "Checkpoints":
        if jax.process_index() == 0 and self.folder.is_dir():
            for unfinished in self.folder.glob(f"*{TEMPORARY}*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        return self

    def __exit__(self, kind, error, trace) -> None:
        first_counts = contextlib.nullcontext() if error is None else contextlib.suppress(Refused)
        try:
            with first_counts:
                self.wait()
        finally:
            if self._log is not None:
                self._log.removeFilter(self._hold)

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
        self.wait()
        ocp, path = self._orbax(), self.folder / str(step)
        context = ocp.Context()
        # Made in the background, a folder that cannot be made leaves threads waiting for it, which hold up the exit.
        context.asynchronous.create_directories_asynchronously = False
        with self._failures(step), context:
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
        wanted, found = named(like), self._metadata(step).metadata
        for name, leaf in wanted.items():
            if name not in found or tuple(found[name].shape) != tuple(leaf.shape):
                holds = f"in shape {tuple(found[name].shape)}" if name in found else "nowhere"
                raise Refused(
                    f"checkpoint {self.folder / str(step)} holds {name} {holds}, and this model needs it in shape "
                    f"{tuple(leaf.shape)}: continue with the model that wrote it, or start afresh with another --name.",
                    DATA,
                )
        ocp = self._orbax()
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with self._reading(step), context:
            arrays = ocp.load(self.folder / str(step), wanted)
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])

    def _metadata(self, step: int):
        with self._reading(step):
            found = self._orbax().metadata(self.folder / str(step))
            if found.metadata is None:  # arrays that cannot be read are no error to Orbax: it only logs why
                raise next(iter(self._logged), ValueError("its list of arrays is damaged"))
        return found

    def _orbax(self):
        import orbax.checkpoint.experimental.v1 as ocp  # a second and a half of imports

        self._log = logging.getLogger("absl")  # not before the import, which makes a logger that knows its callers
        self._log.addFilter(self._hold)
        logging.getLogger("asyncio").addFilter(_not_left_behind)  # for good: it speaks up when the garbage is collected
        return ocp

    def _hold(self, record: logging.LogRecord) -> bool:
        """Whether a line of Orbax's log may be printed: not an error, with its traceback, that we say in a sentence."""
        given = (*(record.args if isinstance(record.args, tuple) else ()), *(record.exc_info or ()))
        errors = [value for value in given if isinstance(value, BaseException)]
        if not errors or "orbax" not in record.pathname:
            return True
        self._logged += errors
        return False

    @contextlib.contextmanager
    def _reading(self, step: int):
        """Turns what goes wrong into one sentence; of the other reads, which Orbax leaves behind, nothing is heard."""
        self._logged.clear()
        hook = sys.unraisablehook
        sys.unraisablehook = lambda shown: None if "Event loop is closed" in str(shown.exc_value) else hook(shown)
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
            path, others = self.folder / str(step), [s for s in self.steps() if s != step]
            remedy = (
                f"delete that folder to continue from step {others[-1]}"
                if others
                else "start afresh with another --name"
            )
            raise Refused(f"checkpoint {path} cannot be read ({cause(error, path)}): {remedy}.", DATA) from error
        sys.unraisablehook = hook  # only where all went well: after a failure the others speak when they are collected

    @contextlib.contextmanager
    def _failures(self, step: int):
        try:
            yield
        except Exception as error:
            raise Refused(
                f"checkpoint {step} could not be written to {self.folder} ({cause(error, self.folder)}): make room or "
                f"give a folder that can be written with --runs, then run the same command to continue.",
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


def _not_left_behind(record: logging.LogRecord) -> bool:
    """False of an error in a read or write that Orbax no longer waits for, as another has failed before it."""
    text = record.getMessage()
    return not ("never retrieved" in text and ("orbax" in text or "tensorstore" in text))


def cause(error: BaseException, folder: Path) -> str:
    """Why a file operation failed, in the error's own words.

    TensorStore names every layer, the outermost first, then the whole of its configuration: the last clauses say what
    happened. Paths are shortened to what lies inside `folder`.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, json.JSONDecodeError):
        line = f"one of its JSON files is damaged: {line}"
    *outer, text = re.sub(r" \[\w+='.*", "", line).replace(f"{folder}/", "").split(": ")
    while outer and len(text) + len(outer[-1]) < 160:
        text = f"{outer.pop()}: {text}"
    return text[:200]
