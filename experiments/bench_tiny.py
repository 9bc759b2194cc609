"""The size of nanoGPT's character model for laptops, in float32: for `llmjax bench`, on synthetic tokens.

    llmjax bench bench_tiny --torch

A step takes a few hundredths of a second, so what surrounds the products shows. Measured on two virtual cores of an
Intel Xeon (2.6 GHz), 2026-11-25, Python 3.11, jax 0.10.2, torch 2.13: 18,071 tokens/s, 0.56 times PyTorch compiled.
On two of an AMD EPYC (Zen 5), 2026-11-28: 37,363 tokens/s, 1.43 times (25,857).
"""

import dataclasses

from experiments import bench_small
from llmjax.data.dataset import Synthetic
from llmjax.models.llama import Llama

run = dataclasses.replace(
    bench_small.run,
    model=Llama(
        vocab=65, layers=4, width=128, heads=4, kv_heads=4, head_dim=32, ff=344, positions=64, theta=1e4, tied=True
    ),
    data=Synthetic(vocab=65),
    batch=12,
    sequence=64,
)

if __name__ == "__main__":
    from llmjax.cli import experiment

    experiment(run)
