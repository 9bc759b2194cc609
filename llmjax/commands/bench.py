"""`llmjax bench`: how fast an experiment's train step runs here, against what the machine's matrix products reach."""

import dataclasses
import json
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llmjax import mesh as meshes
from llmjax import processes as system
from llmjax.errors import DONE, IO, Refused
from llmjax.processes import Processes
from llmjax.run import Run, to_json
from llmjax.train.display import Display, flop_rate
from llmjax.train.program import Program, make, resolve


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long to measure."""

    warmup: int = 3
    "Steps before the clock starts."
    repeats: int = 20
    "Steps that are timed."
    json: str = ""
    "File for the result."


def bench(run: Run, processes: Processes, timing: Timing) -> int:
    """Times the train step on random tokens, each step waited for; prints medians.

    Raises:
      Refused: this run or its timing makes no benchmark.
    """
    check(run, timing)
    devices = system.start(run.mesh, processes)
    mesh = meshes.device_mesh(resolve(run, len(devices)), devices, run.mesh.slices)
    program = make(run, mesh, meshes.chip_of(run.mesh, devices))
    with program.context():
        compile_s, seconds = time_steps(program, timing)
    rate = matmul_rate(program.compute.operands, 2048 if devices[0].platform == "cpu" else 8192) * len(devices)
    if devices[0].platform == "cpu":
        rate /= len(devices)  # emulated devices share the same cores
    step_s = statistics.median(seconds)
    tokens_per_s = run.batch * run.sequence / step_s
    flops = tokens_per_s * program.flops_per_token
    facts = dict(
        tokens_per_s=tokens_per_s, step_ms=1e3 * step_s, slowest_ms=1e3 * max(seconds), fastest_ms=1e3 * min(seconds),
        flops_per_s=flops, matmul_flops_per_s=rate, share_of_matmul=flops / rate,
        mfu=program.peak and flops / program.peak, compile_s=compile_s,
    )  # fmt: skip
    first = jax.process_index() == 0
    display = Display(quiet=not first)
    display.facts(
        f"llmjax bench {run.name}",
        {
            "speed": f"{tokens_per_s:,.0f} tokens/s, {1e3 * step_s:.1f} ms/step "
            f"(median of {timing.repeats}; {1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f})",
            "compute": f"{flop_rate(flops)} in {program.compute.operands}, "
            f"{100 * flops / rate:.0f}% of this machine's matrix product ({flop_rate(rate)})",
            "mfu": f"{100 * facts['mfu']:.1f}% of the chips' bfloat16 peak"
            if facts["mfu"]
            else "not known: this chip's peak is not",
            "compile": f"{compile_s:.1f} s",
        },
    )
    if timing.json and first:
        where = dict(jax=jax.__version__, python=platform.python_version(), devices=[d.device_kind for d in devices])
        Path(timing.json).write_text(json.dumps(facts | where | {"run": to_json(run)}, indent=1) + "\n")
    return DONE


def check(run: Run, timing: Timing) -> None:
    """Refuses, before anything is compiled, what would fail after it."""
    if timing.warmup < 0 or timing.repeats < 1:
        raise Refused(f"warmup is {timing.warmup} and repeats {timing.repeats}: give at least 0 and 1.")
    if not hasattr(run.model, "vocab"):
        raise Refused(f"{run.name} is no language model: bench one of the others that `llmjax experiments` lists.")
    folder = Path(timing.json).absolute().parent
    if not folder.is_dir():
        raise Refused(f"json is {timing.json}, and {folder} is no folder: make it, or choose another file.", IO)


def time_steps(program: Program, timing: Timing) -> tuple[float, list[float]]:
    """(seconds to compile, seconds of every timed step)."""
    run = program.run
    random = np.random.default_rng(run.seed)

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        whole = np.ones(x.shape) if x.dtype == jnp.float32 else random.integers(0, run.model.vocab, x.shape)
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: whole[index].astype(x.dtype))

    batch = jax.tree.map(fill, program.abstract_batch())
    state = program.init(jax.random.key(run.seed))
    began = time.perf_counter()
    step = program.step.lower(state, batch).compile()
    compile_s = time.perf_counter() - began
    seconds = []
    for i in range(timing.warmup + timing.repeats):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        if i >= timing.warmup:
            seconds.append(time.perf_counter() - began)
    return compile_s, seconds


def matmul_rate(dtype: str, size: int, repeats: int = 10) -> float:
    """FLOP/s of a square product of random matrices on one device: the best of several."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    jax.block_until_ready(product(a, b))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(product(a, b))
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)
