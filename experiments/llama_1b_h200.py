"""A Llama of 1.2 B parameters on one H200: 46,000 steps of 0.5 M tokens (24 B).

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
from meshes import h200

run = Run(
    model=Llama(
        vocab=128_256,
        layers=16,
        width=2048,
        heads=32,
        kv_heads=8,
        head_dim=64,
        ff=8192,
        positions=131_072,
        scaling=RopeScaling(factor=32.0),
        tied=True,
    ),
    data=Text(path="data/corpus", tokenizer=TokenizerFile("data/tokenizer.json")),
    optimizer=AdamW(lr=4e-4, schedule=Cosine(warmup=2000)),
    loss=NextToken(),
    mesh=h200.cluster,
    axes=Axes(),
    layout=layout.dp,
    steps=46_000,
    batch=128,
    sequence=4096,
    accumulate=32,  # four sequences at a time: logits and attention scores take gigabytes each
    remat=Remat("full"),
    eval_every=1000,
    save_every=1000,
)

if __name__ == "__main__":
    from llmjax.cli import experiment

    experiment(run)
