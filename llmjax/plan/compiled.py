"""A run's own train step, compiled for a cluster that is not there, and what the compiler says of it."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from jax.sharding import Mesh

from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import like
from llmjax.errors import Refused
from llmjax.layout import axes_of
from llmjax.mesh import Axes, Chip, Cluster
from llmjax.plan import buffers, collectives, cost, hlo, links, schedule, topology
from llmjax.plan.buffers import Buffer
from llmjax.plan.schedule import Moment, Row, Time
from llmjax.plan.topology import NoCompiler
from llmjax.run import Run, from_json, to_json
from llmjax.train import program
from llmjax.train.program import Program, bytes_per_device

__all__ = ["Memory", "NoCompiler", "Report", "mesh", "report"]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    parameters: int
    optimizer: int
    "Its state, the step's number included."
    batch: int
    arguments: int | None
    "Parameters, optimizer and batch as the compiler lays them out; None where it refused."
    outputs: int | None
    aliased: int | None
    "Of the outputs, what takes the place of arguments."
    temporaries: int | None
    "Activations, gradients, gathered weights."
    code: int | None
    peak: int | None
    "Of a TPU: the most that is in use at once, which decides whether a program is refused; else None."
    total: int
    "The peak, or arguments + outputs - aliased + temporaries + code, or what the compiler asks for when it refuses."
    capacity: int | None
    "Of the chip, or of it what the compiler says it may use when it refuses; None where it is not known."


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of a train step."""

    refusal: str
    "Why there is no program, in a sentence, or nothing. Then only memory and buffers say anything."
    memory: Memory
    buffers: tuple[Buffer, ...]
    "The largest that are live at the peak; where the compiler refuses, those it names or a roomier chip would hold."
    rows: tuple[Row, ...]
    "Communication, the longest first. On emulated devices nothing is hidden."
    time: Time | None
    "None where the compiler gives no cycles: everything but a TPU."
    unknown: dict[str, int]
    "Operations whose cost is not known, with the times they run in a step."
    warnings: tuple[str, ...]
    "What in the program is worth a look, a sentence each."
    axes: Axes
    chip: str
    topology: str
    compiler: str
    "Versions of jax, jaxlib and the compiler."
    seconds: float
    "Of tracing, lowering and compiling."
    cached: bool = False
    "Whether the program was not compiled again."
    moments: tuple[Moment, ...] = ()
    "The step in the order of the program, where the compiler gives cycles."

    @property
    def fits(self) -> bool:
        """What a TPU's compiler takes fits; of other chips the compiler knows nothing, so bytes are compared."""
        within = self.memory.capacity is None or self.memory.total <= self.memory.capacity
        return not self.refusal and (within or self.memory.peak is not None)


def mesh(cluster: Cluster, sizes: Axes) -> Mesh:
    """A mesh to compile for. GPUs and CPUs are stood in for by emulated devices of this process.

    Raises:
      NoCompiler: the TPU compiler is not installed, is not the one jax works with, or does not know the chip.
      Refused: there is no such slice, or JAX has started with fewer emulated devices.
    """
    if cluster.chip is not None and cluster.chip.platform == "tpu":
        return meshes.device_mesh(sizes, topology.devices(cluster), cluster.slices)
    count = math.prod(sizes.sizes())
    devices = _emulated(count)
    if len(devices) < count:
        raise Refused(f"{count} emulated devices are needed, but JAX started with {len(devices)}: start a new process.")
    return meshes.device_mesh(sizes, devices)


def _emulated(count: int) -> list[jax.Device]:
    if jax.config.jax_num_cpu_devices < count:
        with contextlib.suppress(RuntimeError):  # JAX has started
            jax.config.update("jax_num_cpu_devices", count)
    return jax.devices("cpu")[:count]


def report(run: Run, sizes: Axes, *, cache: Path | None = None) -> Report:
    """Compiles the run's train step for its own cluster with axes of these sizes.

    A report is kept in `cache` under a hash of the traced program, the versions and the cluster. Custom calls
    other than splash attention, such as a Pallas kernel of one's own, are listed as unknown.

    Raises:
      NoCompiler: the TPU compiler is missing or not the right one; the analytic model is all there is.
      Refused: there is no such slice, or the run cannot be cut so.
    """
    began = time.perf_counter()
    chip = run.mesh.chip
    if chip is None:
        raise Refused(f"mesh {run.mesh.name} leaves its chip open: choose a mesh with a known chip.")
    count = math.prod(sizes.sizes())
    if chip.platform != "tpu" and len(_emulated(count)) < count:
        return _in_another_process(run, sizes, cache)
    made = program.make(run, mesh(run.mesh, sizes), chip)
    state = like(made.abstract_state(), made.mesh)
    with made.context():
        lowered = made.step.lower(state, made.abstract_batch())
    file = cache / f"{_key(lowered.as_text(), run.mesh, sizes)}.json" if cache else None
    known = _cached(file) if file else None
    if known is not None:
        return dataclasses.replace(known, cached=True, seconds=time.perf_counter() - began)
    found = _compiled(made, state, lowered, sizes, chip)
    found = dataclasses.replace(found, seconds=time.perf_counter() - began)
    if file:
        _store(file, found)
    return found


def _compiled(made: Program, state, lowered: jax.stages.Lowered, sizes: Axes, chip: Chip) -> Report:
    held = dict(
        parameters=bytes_per_device(state.model, made.mesh),
        optimizer=bytes_per_device(state.opt, made.mesh) + 4,
        batch=bytes_per_device(made.abstract_batch(), made.mesh),
        capacity=chip.memory and int(chip.memory),
    )
    about = dict(
        axes=sizes, chip=chip.name, topology=made.run.mesh.topology, compiler=versions(made.run.mesh), seconds=0.0
    )
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        said = buffers.refusal(str(error))
        none = dict.fromkeys(("arguments", "outputs", "aliased", "temporaries", "code", "peak"))
        held["capacity"] = said.capacity or held["capacity"]
        total = said.needed + sum(held[name] for name in ("parameters", "optimizer", "batch"))
        memory = Memory(**held, **none, total=total)
        listed = said.buffers or (_largest_elsewhere(made.run, sizes) if chip.platform == "tpu" else ())
        return Report(said.sentence, memory, listed, (), None, {}, (), **about)
    module = hlo.parse(executable.as_text())
    read = schedule.read(module, made.mesh, made.run.mesh, sizes)
    return Report(
        refusal="",
        memory=_memory(executable, held, chip.platform == "tpu"),
        buffers=buffers.largest(module),
        rows=read.rows,
        time=read.time if cost.clock(chip) else None,
        unknown=read.unknown,
        moments=read.moments if cost.clock(chip) else (),
        warnings=_warnings(made.run, read.rows) if chip.platform == "tpu" else (),  # a CPU never scatters sums
        **about,
    )


def _warnings(run: Run, rows: tuple[Row, ...]) -> tuple[str, ...]:
    inside = axes_of(run.layout.inner.get("T"))
    return tuple(schedule.warnings(rows, {axis for axis in axes_of(run.layout.stream.get("T")) if axis not in inside}))


def _largest_elsewhere(run: Run, sizes: Axes) -> tuple[Buffer, ...]:
    """The largest buffers of a program that a chip has no room for: what a v5p, which has more, would hold."""
    roomy = dataclasses.replace(run.mesh.chip, name="TPU v5p")
    cluster = dataclasses.replace(run.mesh, chip=roomy, slices=1, topology="", chips=math.prod(sizes.sizes()))
    try:
        made = program.make(run, mesh(cluster, sizes), roomy)
        with made.context():
            text = made.step.lower(like(made.abstract_state(), made.mesh), made.abstract_batch()).compile().as_text()
    except (Refused, jax.errors.JaxRuntimeError):
        return ()
    return buffers.largest(hlo.parse(text))


def _memory(executable: jax.stages.Compiled, held: dict, on_tpu: bool) -> Memory:
    stats = executable.memory_analysis()
    parts = dict(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    on_host = stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes  # the peak counts it with the device's
    peak = stats.peak_memory_in_bytes - on_host if on_tpu else None  # a CPU's counts no temporaries
    total = peak or sum(parts.values()) - 2 * parts["aliased"]
    return Memory(**held, **parts, peak=peak, total=total)


def versions(cluster: Cluster) -> str:
    """The versions that decide what is compiled."""
    names = ["jax", "jaxlib", *(["libtpu"] if cluster.chip.platform == "tpu" else [])]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def _key(traced: str, cluster: Cluster, sizes: Axes) -> str:
    """Everything that decides a report: the program traced, the readers of what is compiled, the machine."""
    readers = b"".join(
        Path(file).read_bytes()
        for file in (__file__, *(module.__file__ for module in (hlo, schedule, buffers, collectives, cost, links)))
    )
    what = json.dumps([versions(cluster), to_json(cluster), to_json(sizes)]).encode()
    return hashlib.sha256(b"\0".join((traced.encode(), readers, what))).hexdigest()[:32]


def _cached(file: Path) -> Report | None:
    """The report in a file; None where there is none that can be read."""
    try:
        found = from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, Refused, AttributeError, ImportError, TypeError):
        return None
    return found if isinstance(found, Report) else None


def _store(file: Path, found: Report) -> None:
    """Writes a report whole or not at all; a full disk costs the next plan its time, not this one its result."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".part", delete=False, encoding="utf-8") as out:
            json.dump(to_json(found), out)
        os.replace(out.name, file)
    except OSError:
        return


def _in_another_process(run: Run, sizes: Axes, cache: Path | None) -> Report:
    """`report` in a process that may start with as many emulated devices as it takes."""
    asked = json.dumps([to_json(run), to_json(sizes), str(cache) if cache else None])
    done = subprocess.run(
        [sys.executable, "-c", "from llmjax.plan.compiled import answer; answer()"],
        input=asked,
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    if done.returncode:
        raise RuntimeError(f"compiling for {math.prod(sizes.sizes())} emulated devices failed: {done.stderr[-2000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "refused" in answer:
        raise Refused(answer["refused"])
    return from_json(answer)


def answer() -> None:
    """Reads what `_in_another_process` asks and prints the report or the refusal."""
    run, sizes, cache = json.loads(sys.stdin.read())
    try:
        found = to_json(report(from_json(run), from_json(sizes), cache=Path(cache) if cache else None))
    except Refused as refused:
        found = {"refused": str(refused)}
    print(json.dumps(found))
