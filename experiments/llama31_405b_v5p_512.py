"""Llama 3.1 405B on 512 TPU v5p: fully sharded 64 ways, tensor- and sequence-parallel 8 ways.

Put your text in data/corpus and its tokenizer at data/tokenizer.json, or name others with --data.path and
--data.tokenizer.path. Not run yet on this hardware; its shardings and the memory of its state are checked by the tests.
"""

from llmjax import layout
from llmjax.data.dataset import Text
from llmjax.data.tokenizer import TokenizerFile
from llmjax.mesh import Axes
from llmjax.models.attention import RopeScaling
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import Cosine
from llmjax.run import Remat, Run
from llmjax.train.loss import NextToken
from meshes import v5p_512

run = Run(
    model=Llama(
        vocab=128_256,
        layers=126,
        width=16_384,
        heads=128,
        kv_heads=8,
        head_dim=128,
        ff=53_248,
        positions=131_072,
        scaling=RopeScaling(),
    ),
    data=Text(path="data/corpus", tokenizer=TokenizerFile("data/tokenizer.json")),
    optimizer=AdamW(lr=8e-5, schedule=Cosine(warmup=8000)),
    loss=NextToken(),
    mesh=v5p_512.cluster,
    axes=Axes(fsdp=64, tensor=8),
    layout=layout.fsdp_tp_sp,
    steps=1_000_000,
    batch=512,
    sequence=8192,
    accumulate=8,  # one sequence per group of eight at a time: attention scores take T² memory
    remat=Remat("full"),
    eval_every=1000,
    save_every=1000,
)

if __name__ == "__main__":
    from llmjax.cli import experiment

    experiment(run)
