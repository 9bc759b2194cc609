"""Every test sees eight emulated CPU devices, and arrays whose ranks do not match are errors."""

import importlib.metadata
import os
import tempfile

# The tests compile much and run little: three quarters of their time went into machine code faster than they need, and
# into the same code again. What decides the numbers and the communication, the partitioning over devices with its
# warnings, stays as users have it. In the environment, so that it holds for the commands that tests start as well.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones end the process on a flag they do not know
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false " + os.environ.get("XLA_FLAGS", "")
_compiled = tempfile.TemporaryDirectory(prefix="llmjax-tests-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax  # noqa: E402  the lines above must come first

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
