"""Every test sees eight emulated CPU devices, and arrays whose ranks do not match are errors."""

import os
import tempfile

# The tests compile much and run little: LLVM spends no time on fast code (sharding comes before LLVM), and a program
# that another test, or a process started by one, has compiled is not compiled again.
_compiled = tempfile.TemporaryDirectory(prefix="llmjax-tests-")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax  # noqa: E402  the lines above must come first

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
