"""Llama 3 8B on 256 TPU v6e: fully sharded over the pod, one row on each chip.

Put your text in data/corpus and its tokenizer at data/tokenizer.json, or name others with --data.path and
--data.tokenizer.path. Not run yet on this hardware.
`llmjax plan` (2026-11-28) foresees 1.00 s a step, 2,100,248 tokens/s and 27.5 of 29.8 GiB.
"""

import dataclasses

from experiments import llama3_8b_v5p_64
from llmjax.mesh import Axes
from meshes import v6e_256

run = dataclasses.replace(llama3_8b_v5p_64.run, mesh=v6e_256.cluster, axes=Axes(), accumulate=0)

if __name__ == "__main__":
    from llmjax.cli import experiment

    experiment(run)
