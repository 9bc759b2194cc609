"""Llama 3 8B on 64 TPU v5p: fully sharded over each half of the slice.

Put your text in data/corpus and its tokenizer at data/tokenizer.json, or name others with --data.path and
--data.tokenizer.path. Not run yet on this hardware.
`llmjax plan` (2026-11-28) foresees 5.4 s a step, 391,616 tokens/s and 56 of 89 GiB.
"""

from llmjax import layout
from llmjax.data.dataset import Text
from llmjax.data.tokenizer import TokenizerFile
from llmjax.mesh import Axes
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import Cosine
from llmjax.run import Remat, Run
from llmjax.train.loss import NextToken
from meshes import v5p_64

run = Run(
    model=Llama(vocab=128_256, layers=32, width=4096, heads=32, kv_heads=8, head_dim=128, ff=14_336, positions=8192),
    data=Text(path="data/corpus", tokenizer=TokenizerFile("data/tokenizer.json")),
    optimizer=AdamW(lr=3e-4, schedule=Cosine(warmup=2000)),
    loss=NextToken(),
    mesh=v5p_64.cluster,
    axes=Axes(data=2, fsdp=32),  # XLA gathers over a part of the chips, but sums zeros over all of them
    layout=layout.fsdp,
    steps=100_000,
    batch=256,
    sequence=8192,
    accumulate=2,
    remat=Remat("dots"),
    eval_every=1000,
    save_every=1000,
)

if __name__ == "__main__":
    from llmjax.cli import experiment

    experiment(run)
