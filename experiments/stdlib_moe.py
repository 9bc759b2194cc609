"""stdlib_tiny with a mixture of eight experts in every layer, two for each token: as many products, more weights.

    llmjax train stdlib_moe

Not yet run to its end, so there is no score to compare with stdlib_tiny's. The two experts of a token, each 352 wide,
multiply as much as the one feed-forward of 704 there. Experts take at most 1.25 times their mean share of a sequence:
on a CPU the dropless way (`--model.capacity 0`) computes every expert for every row, which takes longer.
Watch `load_max` and `dropped` in metrics.jsonl as the routers become even.
"""

from llmjax.data.dataset import Text
from llmjax.data.tokenizer import BPE
from llmjax.models.mixtral import Mixtral
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import Cosine
from llmjax.run import Run
from llmjax.train.routed import RoutedNextToken
from meshes import local

run = Run(
    model=Mixtral(
        vocab=2048, layers=4, width=256, heads=4, kv_heads=4, head_dim=64, ff=352, positions=256, theta=1e4, tied=True,
        experts=8, top_k=2, capacity=1.25,
    ),
    data=Text(tokenizer=BPE(vocab=2048), heldout=0.05),
    optimizer=AdamW(lr=3e-3, schedule=Cosine(warmup=0.05, final=0.05)),
    loss=RoutedNextToken(),
    mesh=local.cluster,
    steps=800,
    batch=8,
    sequence=256,
    dtype="bfloat16",
    eval_every=200,
    save_every=200,
    prompts=("def parse", "class Node:\n    def __init__(self", "    for key, value in", "    try:\n        import"),
)  # fmt: skip

if __name__ == "__main__":
    from llmjax.cli import experiment

    experiment(run)
