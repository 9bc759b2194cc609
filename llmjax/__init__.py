"""Train large language models in JAX: one program, any mesh, the same numbers."""

__version__ = "0.1.0"
