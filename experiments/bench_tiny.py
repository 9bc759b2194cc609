"""The size of nanoGPT's character model for laptops, in float32: for `llmjax bench`, on synthetic tokens.

    llmjax bench bench_tiny

A step takes a few hundredths of a second, so what surrounds the products shows.
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
