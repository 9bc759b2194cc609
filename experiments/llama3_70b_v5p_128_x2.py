"""Llama 3 70B on two slices of 128 TPU v5p: fully sharded inside a slice, data parallel between them (hybrid FSDP).

The weights are gathered over the fast links of each slice; between the slices, over the slow network, only gradients
travel, once per step and already cut by 128. Put your text in data/corpus and its tokenizer at data/tokenizer.json, or
name others with --data.path and --data.tokenizer.path. Not run yet on this hardware; its shardings and the memory of
its state are checked by the tests.
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
from meshes import v5p_128_x2

run = Run(
    model=Llama(vocab=128_256, layers=80, width=8192, heads=64, kv_heads=8, head_dim=128, ff=28_672, positions=8192),
    data=Text(path="data/corpus", tokenizer=TokenizerFile("data/tokenizer.json")),
    optimizer=AdamW(lr=1.5e-4, schedule=Cosine(warmup=2000)),
    loss=NextToken(),
    mesh=v5p_128_x2.cluster,
    axes=Axes(data=2, fsdp=32, tensor=4),
    layout=layout.fsdp_tp,
    steps=100_000,
    batch=256,
    sequence=8192,
    accumulate=4,  # one sequence per device at a time: attention scores take T² memory
    remat=Remat("full"),
    eval_every=1000,
    save_every=1000,
)

if __name__ == "__main__":
    from llmjax.cli import experiment

    experiment(run)
