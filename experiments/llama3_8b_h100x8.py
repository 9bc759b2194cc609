"""Llama 3 8B on eight H100: fully sharded over one node.

Put your text in data/corpus and its tokenizer at data/tokenizer.json, or name others with --data.path and
--data.tokenizer.path. Not run yet on this hardware; its shardings and the memory of its state are checked by the tests.
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
from meshes import h100x8

run = Run(
    model=Llama(vocab=128_256, layers=32, width=4096, heads=32, kv_heads=8, head_dim=128, ff=14_336, positions=8192),
    data=Text(path="data/corpus", tokenizer=TokenizerFile("data/tokenizer.json")),
    optimizer=AdamW(lr=3e-4, schedule=Cosine(warmup=2000)),
    loss=NextToken(),
    mesh=h100x8.cluster,
    axes=Axes(fsdp=8),
    layout=layout.fsdp,
    steps=100_000,
    batch=64,
    sequence=8192,
    accumulate=8,  # one sequence per device at a time: attention scores take T² memory
    remat=Remat("full"),
    eval_every=1000,
    save_every=1000,
)

if __name__ == "__main__":
    from llmjax.cli import experiment

    experiment(run)
