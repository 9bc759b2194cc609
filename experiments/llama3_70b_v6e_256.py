"""Llama 3 70B on 256 TPU v6e: fully sharded 64 ways, tensor- and sequence-parallel 4 ways.

Put your text in data/corpus and its tokenizer at data/tokenizer.json, or name others with --data.path and
--data.tokenizer.path. Not run yet on this hardware.
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
from meshes import v6e_256

run = Run(
    model=Llama(vocab=128_256, layers=80, width=8192, heads=64, kv_heads=8, head_dim=128, ff=28_672, positions=8192),
    data=Text(path="data/corpus", tokenizer=TokenizerFile("data/tokenizer.json")),
    optimizer=AdamW(lr=1.5e-4, schedule=Cosine(warmup=2000)),
    loss=NextToken(),
    mesh=v6e_256.cluster,
    axes=Axes(fsdp=64, tensor=4),
    layout=layout.fsdp_tp_sp,
    steps=500_000,
    batch=512,
    sequence=8192,
    accumulate=4,  # two sequences per group of four at a time: of one, XLA sums whole what it could sum in parts
    remat=Remat("full"),
    eval_every=1000,
    save_every=1000,
)

if __name__ == "__main__":
    from llmjax.cli import experiment

    experiment(run)
