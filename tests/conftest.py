"""Every test sees eight emulated CPU devices, and arrays whose ranks do not match are errors."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
