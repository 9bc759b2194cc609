"""Llama 3 8B on 256 TPU v6e: fully sharded over the pod, one row on each chip.

Put your text in data/corpus and its tokenizer at data/tokenizer.json, or name others with --data.path and
--data.tokenizer.path. Not run yet on this hardware.
`llmjax plan` (2026-11-28) foresees 1.00 s a step, 2,100,248 tokens/s and 27.5 of 29.8 GiB.
"""

from llmjax import layout
from llmjax.data.dataset import Text
from llmjax.data.tokenizer import TokenizerFile
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import Cosine
from llmjax.run import Remat, Run
from llmjax.train.loss import NextToken
from meshes import v6e_256

run = Run(
    model=Llama(vocab=128_256, layers=32, width=4096, heads=32, kv_heads=8, head_dim=128, ff=14_336, positions=8192),
    data=Text(path="data/corpus", tokenizer=TokenizerFile("data/tokenizer.json")),
    optimizer=AdamW(lr=3e-4, schedule=Cosine(warmup=2000)),
    loss=NextToken(),
    mesh=v6e_256.cluster,
    layout=layout.fsdp,
    steps=100_000,
    batch=256,
    sequence=8192,
    remat=Remat("dots"),
    eval_every=1000,
    save_every=1000,
)

if __name__ == "__main__":
    from llmjax.cli import experiment

    experiment(run)
