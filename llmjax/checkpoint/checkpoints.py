"""Checkpoints of a run: written by Orbax in the background, each array in shards, read back on any mesh.

A checkpoint is a folder named by its step. Orbax writes it under another name; a thread of the first process then adds
the manifest of its files, renames it, and reads it back. So a folder with a plain number is complete, and provably what
was written, whenever the process was killed. Arrays are stored by readable names, such as `model.blocks.query_DHK`,
free of how the state is nested in this version of any library.
"""

import concurrent.futures
import contextlib
import errno
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from llmjax import processes
from llmjax.checkpoint import folder as files
from llmjax.checkpoint import manifest
from llmjax.checkpoint.retention import Retention
from llmjax.errors import DATA, IO, Refused


class Checkpoints:
    """The checkpoints in a folder, of which some stay (`retention`); a resource, to be used in a `with`.

    With several processes, all of them call every method, at the same point; the first one reads, hashes and decides.
    `say` is told in a line what is passed over or found damaged.
    """

    def __init__(self, folder: Path, retention: Retention = Retention(), say: Callable[[str], None] = print):
        self.folder, self.retention, self.say = Path(folder).absolute(), retention, say
        self._writing: tuple[int, concurrent.futures.Future[str | None]] | None = None
        self._bytes = 0  # of the state that was saved last
        self._good: set[int] = set()  # verified or written by this process
        self._damaged: set[int] = set()
        self._tidied = False
        self._log: logging.Logger | None = None
        self._logged: list[BaseException] = []

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        first_counts = contextlib.nullcontext() if error is None else contextlib.suppress(Refused)
        try:
            with first_counts:
                self._wait(together=error is None)
        finally:
            if self._log is not None:
                self._log.removeFilter(self._hold)

    def steps(self) -> list[int]:
        """The steps that have a folder with something in it, oldest first, verified or not."""
        return files.steps(self.folder)

    def latest(self) -> int | None:
        """The newest of `steps`, which need not be what was written."""
        return max(self.steps(), default=None)

    def newest_verified(self, until: int | None = None) -> int | None:
        """The newest step, of those `until` one, whose files are what was written; None if there is none at all.

        Says in a line which steps it passed over and what it ignored, and why.

        Raises:
          Refused: there are steps, and none of them verifies.
        """
        found, reasons = -1, {}
        if jax.process_index() == 0:
            for name, kind in files.ignored(self.folder).items():
                self.say(f"Ignored {self.folder / name}: {kind}.")
            for step in reversed([step for step in self.steps() if until is None or step <= until]):
                if (reason := self.verify(step)) is None:
                    found = step
                    break
                reasons[step] = reason
            for step, reason in reasons.items() if found >= 0 else ():
                self.say(f"Passed over checkpoint {self.folder / str(step)}: {reason}.")
        found = processes.agree(-2 if found < 0 and reasons else found)
        if found == -2:
            raise Refused(self._none_verifies(reasons), DATA)
        if found >= 0:
            self._good.add(found)
        return found if found >= 0 else None

    def verify(self, step: int) -> str | None:
        """Reads all of a checkpoint back: why it is not what was written, or None if it is, which is then noted."""
        folder = self.folder / str(step)
        reason = manifest.damage(folder, threads=min(8, os.cpu_count() or 1))
        (self._damaged.discard if reason is None else self._damaged.add)(step)
        if reason is None:
            manifest.mark_verified(folder)
        return reason

    def has(self, step: int) -> bool:
        """Whether this step was verified or saved since the start; the same on every process."""
        return step in self._good

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Starts to write `state`, with `facts` (JSON) in its manifest; waits only for the checkpoint before.

        The arrays may be donated as soon as this returns. A checkpoint of this step that is there is replaced.

        Raises:
          Refused: this checkpoint, or the one before, could not be written.
        """
        self.wait()
        if jax.process_index() == 0 and not self._tidied:
            files.tidy(self.folder)
            self._tidied = True
        ocp, path = self._orbax(), self.folder / f"{step}{files.UNSEALED}"
        context = ocp.Context()
        # Made in the background, a folder that cannot be made leaves threads waiting for it, which hold up the exit.
        context.asynchronous.create_directories_asynchronously = False
        self._bytes = sum(x.nbytes for x in jax.tree.leaves(state))
        with self._failures(step), context:
            written = ocp.save_async(path, named(state), overwrite=True, custom_metadata=facts)
            pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
            self._writing = step, pool.submit(self._seal, written, step, facts)
            pool.shutdown(wait=False)
        self._good.add(step)

    def wait(self) -> None:
        """Returns when everything saved is on disk, and the checkpoints that need not stay are gone.

        Raises:
          Refused: the checkpoint could not be written.
        """
        self._wait(together=True)

    def facts(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays.

        Raises:
          Refused: the manifest cannot be read.
        """
        try:
            return manifest.read(self.folder / str(step)).facts
        except ValueError as error:
            raise self._unreadable(step, str(error)) from error

    def trust(self, step: int) -> None:
        """Takes a checkpoint without a whole manifest, as older versions wrote them, as it is: writes its manifest.

        Raises:
          Refused: it is no checkpoint of Orbax, or cannot be written.
        """
        facts = dict(self._metadata(step).custom_metadata or {})
        with self._failures(step):
            manifest.write(self.folder / str(step), facts)

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

    def _seal(self, written: Any, step: int, facts: dict[str, Any]) -> str | None:
        """Once Orbax has written a step: its manifest, its name, its proof; then deletes what need not stay.

        Returns why the step cannot be read back, if it cannot. Runs in a thread of its own; only the first process of
        several does anything.
        """
        written.result()
        if jax.process_index() != 0:
            return None
        unsealed, path = self.folder / f"{step}{files.UNSEALED}", self.folder / str(step)
        manifest.write(unsealed, facts)
        if str(step) in (others := files.ignored(self.folder)):
            raise FileExistsError(errno.EEXIST, f"{others[str(step)]} is in its place", str(path))
        if path.is_dir():
            files.drop(self.folder, step)
        unsealed.rename(path)
        manifest.sync(self.folder)
        reason = manifest.damage(path)
        (self._damaged.discard if reason is None else self._damaged.add)(step)
        if reason is None:
            manifest.mark_verified(path)
        files.prune(self.folder, step, self.retention, self._damaged)
        return reason

    def _wait(self, *, together: bool) -> None:
        if self._writing is None:
            return
        (step, sealed), self._writing = self._writing, None
        try:
            with self._failures(step):
                reason = sealed.result()
        except Refused:
            if together:
                processes.every(False)
            raise
        if together and not processes.every(True):
            self._good.discard(step)
            if jax.process_index() == 0:
                files.abandon(self.folder, step)
            raise Refused(f"checkpoint {step} could not be written by another process: see its output.", IO)
        if reason is not None:
            self.say(f"Checkpoint {self.folder / str(step)} is not what was written: {reason}. Look at this disk.")

    def _none_verifies(self, reasons: dict[int, str]) -> str:
        listed = "; ".join(f"{step}: {reason}" for step, reason in list(reasons.items())[:8]) or "see process 0"
        older = next((step for step, reason in reasons.items() if manifest.NAME in reason), None)
        trust = (
            "" if older is None else f", take one as it is (llmjax checkpoints {self.folder.parent} --trust {older})"
        )
        return (
            f"no checkpoint in {self.folder} is what was written ({listed}): bring one back from a copy{trust}, "
            f"or start afresh with another --name."
        )

    def _unreadable(self, step: int, why: str) -> Refused:
        path, others = self.folder / str(step), [s for s in self.steps() if s != step]
        remedy = (
            f"delete that folder to continue from step {others[-1]}" if others else "start afresh with another --name"
        )
        return Refused(f"checkpoint {path} cannot be read ({why}): {remedy}.", DATA)

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
            raise self._unreadable(step, cause(error, self.folder / str(step))) from error
        sys.unraisablehook = hook  # only where all went well: after a failure the others speak when they are collected

    @contextlib.contextmanager
    def _failures(self, step: int):
        try:
            yield
        except Exception as error:
            why = cause(error, self.folder)
            self._good.discard(step)
            if jax.process_index() == 0:
                files.abandon(self.folder, step)  # what is half written would keep a full disk full
            with contextlib.suppress(OSError):
                why += f"; it takes {self._bytes:,} bytes, and {shutil.disk_usage(self.folder).free:,} are free"
            raise Refused(
                f"checkpoint {step} could not be written to {self.folder} ({why}): make room or give a folder that can "
                f"be written with --runs, then run the same command to continue.",
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
        spec, kind = (x.sharding.spec, x.sharding.memory_kind) if x.sharding is not None else (jax.P(), None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec, memory_kind=kind))

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
