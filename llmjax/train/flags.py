"""Options with which XLA compiles a train step, beside its defaults: few, each with what it is for and whence.

They are given to the compiler step by step, so that nothing in the environment has to be set before JAX starts, and a
plan is compiled with what the run will be.
"""

import functools
import re
import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import P
from jax.sharding import Mesh, NamedSharding

from llmjax.mesh import Chip

Options = Mapping[str, bool | int | str]

# Weights are gathered while products run. XLA for v5e does so unasked; for others these are the options of
# AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py (CF_FOR_ALL_GATHER), and its scripts for v5p (the last one:
# the two cores of a chip share a product, and a gather that such a product takes along could not run beside it).
GATHERED_MEANWHILE = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_tpu_megacore_fusion_allow_ags": False,
}
# The sparse cores of a chip exchange what the others go on without. (maxtext, the same file, for v6e; the option for
# gathers over two axes of a torus is from libtpu's own list)
BY_SPARSE_CORES = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_sc_disable_megacore_partitioning": True,
}
# What a loop over the tiles of a product may hold in a core's vector memory, in KiB. By the compiler's cycles half of a
# v5p's 64 MiB makes the products of Llama 3 8B take 0.88 of the time (all of it 0.87, twice as long to compile), and
# three quarters of a v6e's 128 MiB 0.78 (half of it 0.81). (maxtext, the same file, for v6e)
TILES = "xla_tpu_scoped_vmem_limit_kib"
# Transfers move to where they can run beside kernels. (NVIDIA/JAX-Toolbox, the flags of its images)
GPU = {"xla_gpu_enable_latency_hiding_scheduler": True}
TPU = {
    "TPU v5p": GATHERED_MEANWHILE | {TILES: 32 * 1024},
    "TPU v6e": BY_SPARSE_CORES | {TILES: 96 * 1024},
}

# Chips for which XLA compiles products together with what is done to their results. By the compiler's cycles it pays on
# v6e, whose products write straight into the stacks of what is kept and take norms and sums along: Llama 3 8B's step on
# 256 takes 0.96 of the time and 1.9 GiB less. A v5p's products take longer for it than norms and gates take alone.
TOGETHER = {"TPU v6e"}


def options(chip: Chip) -> Options:
    """What a step for such chips is compiled with. Of a CPU's options none made steps faster."""
    return GPU if chip.platform == "gpu" else TPU.get(chip.name, {})


def known(asked: Options, mesh: Mesh) -> Options:
    """Those of the options that the compiler for these devices has. It warns of each that is left out."""
    return dict(_known(tuple(asked.items()), mesh))


@functools.cache
def _known(asked: tuple[tuple[str, bool | int | str], ...], mesh: Mesh) -> tuple[tuple[str, bool | int | str], ...]:
    if not asked:
        return ()
    nothing = jax.jit(lambda: jnp.int32(0), out_shardings=NamedSharding(mesh, P()))
    try:
        nothing.lower().compile(compiler_options=dict(asked))
    except jax.errors.JaxRuntimeError as error:
        unknown = re.search(r"No such compile option: '(\w+)'", str(error))
        if unknown is None:
            raise
        warnings.warn(f"The installed XLA has no option {unknown[1]}: compiling without it.", stacklevel=3)
        return _known(tuple(each for each in asked if each[0] != unknown[1]), mesh)
    return asked
