"""GPT-2 124M on one H200: 19,560 steps of 0.5 M tokens (10 B).

Put your text in data/corpus and its tokenizer at data/tokenizer.json, or name others with --data.path and
--data.tokenizer.path. Not run yet on this hardware; its shardings and the memory of its state are checked by the tests.
"""

from llmjax import layout
from llmjax.data.dataset import Text
from llmjax.data.tokenizer import TokenizerFile
from llmjax.mesh import Axes
from llmjax.models.gpt2 import GPT2
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import Cosine
from llmjax.run import Remat, Run
from llmjax.train.loss import NextToken
from meshes import h200

run = Run(
    model=GPT2(),
    data=Text(path="data/corpus", tokenizer=TokenizerFile("data/tokenizer.json")),
    optimizer=AdamW(lr=6e-4, schedule=Cosine(warmup=700)),
    loss=NextToken(),
    mesh=h200.cluster,
    axes=Axes(),
    layout=layout.dp,
    steps=19_560,
    batch=512,
    sequence=1024,
    accumulate=16,  # all logits of the batch at once would take 105 GB
    remat=Remat("dots"),
    eval_every=1000,
    save_every=1000,
)

if __name__ == "__main__":
    from llmjax.cli import experiment

    experiment(run)
