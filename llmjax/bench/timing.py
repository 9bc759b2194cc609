"""Seconds of a train step on the devices of this machine, and what their matrix products reach."""

import dataclasses
import os
import resource
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax import mesh as meshes
from llmjax import processes as system
from llmjax.plan.budget import within
from llmjax.processes import Processes
from llmjax.run import Run
from llmjax.train.program import Program, make, resolve


def program(run: Run, processes: Processes) -> tuple[Program, list[jax.Device]]:
    """The run's program on the devices that are here."""
    devices = system.start(run.mesh, processes)
    axes, chip = resolve(run, len(devices)), meshes.chip_of(run.mesh, devices)
    return make(within(run, axes, chip), meshes.device_mesh(axes, devices, run.mesh.slices), chip), devices


class Steps:
    """A resource: the compiled train step of a program and the state it has come to, on random tokens.

    Everything happens inside `program.context()`.
    """

    def __init__(self, program: Program):
        self.batch = _batch(program)
        self.state = program.init(jax.random.key(program.run.seed))
        began = time.perf_counter()
        self.step = program.step.lower(self.state, self.batch).compile()
        self.compile_s = time.perf_counter() - began

    def __call__(self) -> None:
        """Takes one step and waits for it."""
        self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))

    def bytes(self) -> int:
        """Bytes of one device in a step, by the compiler: arguments, results in places of their own, temporaries."""
        found = self.step.memory_analysis()
        results = found.output_size_in_bytes - found.alias_size_in_bytes
        return found.argument_size_in_bytes + results + found.temp_size_in_bytes


def timed(step: Any, count: int) -> list[float]:
    """Seconds of each of so many calls."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return seconds


def time_steps(program: Program, warmup: int, repeats: int) -> list[float]:
    """Seconds of each step after so many that are not counted."""
    step = Steps(program)
    timed(step, warmup)
    return timed(step, repeats)


def peak_bytes(devices: list[jax.Device]) -> int | None:
    """The most that a device has held since the process began; of a CPU, None."""
    found = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices if device.platform != "cpu"]
    return max((each for each in found if each), default=None)


def process_bytes() -> int:
    """The most memory that this process has had resident since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def matmul_rate(dtype: str, devices: list[jax.Device], repeats: int = 10) -> float:
    """FLOP/s of a square product of random matrices on all devices together: the best of several on one of them."""
    on_cpu = devices[0].platform == "cpu"
    size = 2048 if on_cpu else 8192
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    jax.block_until_ready(product(a, b))
    rate = 2 * size**3 / min(timed(lambda: jax.block_until_ready(product(a, b)), repeats))
    return rate if on_cpu else rate * len(devices)  # emulated devices share the same cores


@dataclasses.dataclass(frozen=True)
class Spread:
    """Of the seconds that the steps took."""

    median: float
    fastest: float
    slowest: float
    quartiles: tuple[float, float]
    "A quarter of the steps took less than the first, a quarter more than the second."


def spread(seconds: list[float]) -> Spread:
    """The median of steps and how far they lie around it."""
    low, high = statistics.quantiles(seconds, method="inclusive")[::2] if len(seconds) > 1 else seconds * 2
    return Spread(statistics.median(seconds), min(seconds), max(seconds), (low, high))


def _batch(program: Program) -> dict[str, jax.Array]:
    random = np.random.default_rng(program.run.seed)

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        whole = np.ones(x.shape) if x.dtype == jnp.float32 else random.integers(0, program.run.model.vocab, x.shape)
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: whole[index].astype(x.dtype))

    return jax.tree.map(fill, program.abstract_batch())
