"""Every test sees eight emulated CPU devices, and arrays whose ranks do not match are errors."""

import importlib.metadata
import os

# The tests compile much and run little: two thirds of their time went into machine code faster than they need. What
# decides the numbers and the communication, the partitioning over devices with its warnings, stays as users have it;
# no program comes from a cache, so what XLA says of it is said in the test that looks for it. In the environment, so
# that it holds for the commands that tests start as well.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones end the process on a flag they do not know
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false " + os.environ.get("XLA_FLAGS", "")

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
