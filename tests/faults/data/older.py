"""The run of which `older_run` holds a checkpoint, as the version before steps were watched wrote it.

Made by that version: `llmjax train older.py --processes.devices 1`, less the checkpoint of step 8 and the `finish`.
"""

from llmjax.data.dataset import Synthetic
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.run import Run
from llmjax.train.loss import NextToken
from meshes import local

run = Run(
    model=Llama(vocab=16, layers=1, width=8, heads=2, kv_heads=2, head_dim=4, ff=16, positions=8),
    data=Synthetic(vocab=16, rows=32),
    optimizer=AdamW(lr=3e-3),
    loss=NextToken(),
    mesh=local.cluster,
    steps=8,
    batch=4,
    sequence=8,
    dtype="float32",
    save_every=4,
    name="older",
)
