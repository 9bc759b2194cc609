"""A small Llama on one megabyte of Python's standard library, a token per byte, under a tuned AdamW.

llmjax train chars_adamw
"""

from llmjax.data.dataset import Text
from llmjax.data.tokenizer import Bytes
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import Cosine
from llmjax.run import Run
from llmjax.train.loss import NextToken
from meshes import local

run = Run(
    model=Llama(
        vocab=264, layers=4, width=128, heads=4, kv_heads=4, head_dim=32, ff=352, positions=64, theta=1e4, tied=True
    ),
    data=Text(tokenizer=Bytes(), size=1_000_000),
    optimizer=AdamW(lr=3e-3, schedule=Cosine(warmup=0.05, final=0.0)),
    loss=NextToken(),
    mesh=local.cluster,
    steps=2000,
    batch=12,
    sequence=64,
    dtype="float32",
)

if __name__ == "__main__":
    from llmjax.cli import experiment

    experiment(run)
