"""The model and text of `chars_adamw` under a tuned Muon, in half the steps.

llmjax train chars_muon
"""

import dataclasses

from experiments import chars_adamw
from llmjax.optim.muon import Muon
from llmjax.optim.schedules import Cosine

run = dataclasses.replace(
    chars_adamw.run,
    optimizer=Muon(lr=6e-3, others_lr=6e-3, schedule=Cosine(warmup=0.05, final=0.0), operands="bfloat16"),
    steps=1000,
)

if __name__ == "__main__":
    from llmjax.cli import experiment

    experiment(run)
