"""How much the activations of a model change in its first steps, by width: as much at any under muP, more under AdamW.

    python -m experiments.coordinates --json coordinates.json --png coordinates.png         # the picture: llmjax[plots]

The coordinate check of arXiv:2203.03466, section D.1. The mean absolute change of each activation, over tokens and
layers, goes as a power of the width; under the maximal update parametrization that power is near 0 for all of them. One
above 0 ends in steps that are too large for a wide model, one below 0 in a part of it that learns nothing. The data has
few different tokens, as the law is that of models wider than the number of directions that they are pulled in. Logits
fall a little all the same: those of a fresh head, which steps take back, are as 1/sqrt(D).

From width 64 to 1024, two seeds (2026-11-25, Python 3.11, jax 0.10.2; 2 min): the powers of attention, feed-forward,
stream and logits are -0.02, -0.03, -0.01 and -0.13 under muP, and 1.25, 1.67, 1.66 and 0.50 under AdamW.
"""

import dataclasses
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import transfer
from llmjax.data.dataset import Synthetic
from llmjax.evaluate.parity import stream
from llmjax.models import nn
from llmjax.models.llama import Llama, LlamaModel
from llmjax.optim.adamw import AdamW
from llmjax.optim.mup import MuP
from llmjax.optim.schedules import Constant
from llmjax.run import Run

ADAMW = AdamW(lr=2**-7, schedule=Constant(), weight_decay=0.0)
OPTIMIZERS = dict(AdamW=ADAMW, MuP=MuP(base=64, **vars(ADAMW)))
WIDTHS, STEPS, SEEDS = (64, 128, 256, 512, 1024), 4, 2
KINDS = ("attention", "feed-forward", "stream", "logits")


def sized(width: int) -> Llama:
    """The model at a width, with few tokens."""
    return dataclasses.replace(transfer.sized(width), vocab=16, positions=16)


run = dataclasses.replace(
    transfer.run, model=sized(64), data=Synthetic(vocab=16), optimizer=OPTIMIZERS["MuP"], steps=STEPS, clip=0.0,
    batch=4, sequence=16,
)  # fmt: skip


def activations(model: LlamaModel, tokens_BT: jax.Array) -> dict[str, jax.Array]:
    """What attention and feed-forward add to the stream, and the stream after, each [L, B, T, D]; logits [B, T, V]."""

    def layer(block, x_BTD, _):
        e = block.c.epsilon
        attention_BTD = block.attention(nn.enter(nn.rms_norm(x_BTD, block.attention_scale_D, e)), None)
        x_BTD = x_BTD + attention_BTD
        mlp_BTD, _ = block.mlp(nn.enter(nn.rms_norm(x_BTD, block.mlp_scale_D, e)))
        return x_BTD + mlp_BTD, (attention_BTD, mlp_BTD, x_BTD + mlp_BTD)

    x_BTD, found = nn.layers(layer, model.blocks, model.embed(tokens_BT), None)
    return dict(zip(KINDS, (*found, model.head(x_BTD)), strict=True))


def changes(run: Run) -> dict[str, float]:
    """The mean absolute change of each kind of activation on the run's first batch, from before its first step to after
    its last one."""
    program, random = transfer.on_one_device(run), np.random.default_rng(run.seed)
    rows = stream(random, run.batch * run.steps, run.sequence + 1, run.model.vocab)
    rows = rows.reshape(run.steps, program.accumulate, -1, run.sequence + 1)
    look = jax.jit(activations)
    with program.context():
        state = program.init(jax.random.key(run.seed))
        before = look(state.model, jnp.asarray(rows[0, 0, :, :-1]))
        for tokens in rows:
            batch = dict(tokens=tokens[..., :-1], targets=tokens[..., 1:])
            batch["weights"] = np.ones(batch["tokens"].shape, np.float32)
            state, _ = program.step(state, jax.device_put(batch, program.batch_sharding()))
        after = look(state.model, jnp.asarray(rows[0, 0, :, :-1]))
        return {kind: float(jnp.mean(jnp.abs(after[kind] - before[kind]))) for kind in KINDS}


def measure(run: Run, widths: Sequence[int], seeds: int) -> dict[str, list[float]]:
    """Of each kind, the change at each width: the mean over seeds."""
    found = []
    for width in widths:
        here = dataclasses.replace(run, model=sized(width))
        found.append([changes(dataclasses.replace(here, seed=seed)) for seed in range(seeds)])
    return {kind: [float(np.mean([one[kind] for one in each])) for each in found] for kind in KINDS}


def slope(widths: Sequence[int], change: Sequence[float]) -> float:
    """The power of the width that the change goes with: the least-squares line through their logarithms."""
    return float(np.polyfit(np.log(widths), np.log(change), 1)[0])


def draw(found: dict[str, Any], path: Path) -> None:
    """The changes against the width on logarithmic axes, a panel for each optimizer and a line for each kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(OPTIMIZERS), figsize=(10, 4.2), sharey=True, layout="constrained")
    for panel, name in zip(panels, OPTIMIZERS, strict=True):
        for kind, change in found[name].items():
            power = slope(found["widths"], change)
            panel.plot(found["widths"], change, marker="o", markersize=4, label=f"{kind} ~ width$^{{{power:.2f}}}$")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set(title=name, xlabel="width")
        panel.legend()
    panels[0].set_ylabel(f"mean absolute change in {STEPS} steps")
    figure.savefig(path, dpi=150)


def main(
    widths: tuple[int, ...] = WIDTHS, seeds: int = SEEDS, json: Path | None = None, png: Path | None = None
) -> None:
    """Measures, prints a table, and writes figures and a picture.

    Args:
      widths: Of the stream, each a multiple of 32.
      seeds: Means are taken over so many.
      json: Where to write the figures.
      png: Where to draw them, with matplotlib (the extra `plots`).
    """
    found: dict[str, Any] = dict(widths=list(widths))
    print(" " * 20 + "".join(f"{width:>9}" for width in widths) + "    power")
    for name, optimizer in OPTIMIZERS.items():
        found[name] = measure(dataclasses.replace(run, optimizer=optimizer), widths, seeds)
        for kind, change in found[name].items():
            numbers = "".join(f"{x:9.4f}" for x in change)
            print(f"{name:>6} {kind:>12} {numbers} {slope(widths, change):+8.2f}", flush=True)
    if json:
        json.write_text(dumps(found, indent=1) + "\n")
    if png:
        draw(found, png)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
