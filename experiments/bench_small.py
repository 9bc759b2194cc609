"""The size of nanoGPT's character model, in float32: for `llmjax bench`, on synthetic tokens.

    llmjax bench --torch

Measured on two virtual cores of an Intel Xeon with AMX (2.6 GHz), 2026-11-25, Python 3.11, jax 0.10.2, torch 2.13:
2,517 tokens/s, 51 % of what a 2048² float32 matrix product reaches there (0.33 TFLOP/s) and 0.69 times PyTorch compiled
(3,798); in bfloat16 5,062, 0.62 times (8,319). On two of an AMD EPYC (Zen 5), 2026-11-28: 3,761 tokens/s, 52 %
(0.49 TFLOP/s) and 1.53 times (2,443), in another run 3,867 and 1.43 times; in bfloat16 6,237, 0.98 times (6,342). On
two of a Zen 4, 2026-11-24, without PyTorch beside it: 1,890 to 2,050 tokens/s, 63 to 66 % (0.21 TFLOP/s).
"""

from llmjax.data.dataset import Synthetic
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import Constant
from llmjax.run import Run
from llmjax.train.loss import NextToken
from meshes import local

run = Run(
    model=Llama(
        vocab=65, layers=6, width=384, heads=6, kv_heads=6, head_dim=64, ff=1024, positions=256, theta=1e4, tied=True
    ),
    data=Synthetic(vocab=65),
    optimizer=AdamW(lr=1e-3, schedule=Constant()),
    loss=NextToken(),
    mesh=local.cluster,
    steps=200,
    batch=16,
    sequence=256,
    dtype="float32",
)

if __name__ == "__main__":
    from llmjax.cli import experiment

    experiment(run)
