"""The best learning rate of narrow models is that of wider ones under muP, and is not under plain AdamW.

    python -m experiments.transfer --json transfer.json --png transfer.png      # the picture: pip install llmjax[plots]

The model and text of `chars_adamw`, two layers with a head of their own, trained at every width with every rate of a
grid and each optimizer; at `BASE` they are one. What counts is the loss on the first held-out text after the last step.

On two virtual cores of an Intel Xeon (2026-11-25, Python 3.11, jax 0.10.2; 13 min of processor time): the best rate of
the grid is 2^-7 at every width under muP; under AdamW it is 2^-7, 2^-8, 2^-9 and 2^-10 at widths 64, 128, 256 and 512.
In so few steps AdamW at each width's own best rate is ahead, 2.055 to 2.101 nats at 512: a head that starts small has
to grow. After 600 steps of width 256 it is not, 1.693 at 2^-9 to 1.687 at 2^-7.
"""

import dataclasses
import math
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import chars_adamw
from llmjax import mesh as meshes
from llmjax.data import batches
from llmjax.data.dataset import Dataset
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.optim.mup import MuP
from llmjax.optim.schedules import Cosine
from llmjax.run import Run
from llmjax.train import step as steps
from llmjax.train.program import Program, make, resolve, transformation

HELD_OUT = 256  # rows
BASE, WIDTHS, RATES = 64, (64, 128, 256, 512), tuple(2.0**-k for k in range(11, 4, -1))


def sized(width: int) -> Llama:
    """The model at a width: more heads of 32, and a feed-forward in proportion."""
    heads = dict(heads=width // 32, kv_heads=width // 32)
    return dataclasses.replace(chars_adamw.run.model, layers=2, width=width, ff=11 * width // 4, tied=False, **heads)


ADAMW = AdamW(lr=2**-7, schedule=Cosine(warmup=0.2, final=0.0), b1=0.8)
OPTIMIZERS = dict(AdamW=ADAMW, MuP=MuP(base=BASE, **vars(ADAMW)))
run = dataclasses.replace(chars_adamw.run, model=sized(BASE), optimizer=OPTIMIZERS["MuP"], steps=150, batch=8)


def on_one_device(run: Run) -> Program:
    """The run's program on the first device of this machine."""
    devices = jax.devices()[:1]
    return make(run, meshes.device_mesh(resolve(run, 1), devices), meshes.chip_of(run.mesh, devices))


def losses(run: Run, rates: Sequence[float], dataset: Dataset) -> list[float]:
    """The held-out loss in nats after the run at each of the rates: its steps, compiled once for all of them.

    Steps of Adam are in proportion to the rate, so the run at rate 1 is traced and its steps multiplied.
    """
    program, ones = on_one_device(run), dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, lr=1.0))
    tx, sharding = transformation(ones), program.batch_sharding()

    def step(model, opt, batch, lr):
        _, _, grads = steps.gradients(model, batch, run.loss)
        updates, opt = tx.update(grads, opt, model)
        return optax.apply_updates(model, jax.tree.map(lambda x: lr * x, updates)), opt

    def batch(split, rows):
        return batches.place(dataset, split, rows, accumulate=program.accumulate, sharding=sharding)

    step, found = jax.jit(step, donate_argnums=(0, 1)), []
    with program.context():
        for lr in rates:
            state = program.init(jax.random.key(run.seed))
            model, opt = state.model, state.opt
            for at in range(run.steps):
                rows = batches.order(at, batch=run.batch, size=dataset.size("train"), seed=run.seed)
                model, opt = step(model, opt, batch("train", rows), jnp.float32(lr))
            rows = np.arange(HELD_OUT).reshape(-1, run.batch)
            evaluated = [program.evaluate(model, batch("heldout", each)) for each in rows]
            total, weight = np.sum([(nats, sums["weight"]) for nats, sums in evaluated], 0)
            found.append(float(total / weight) if math.isfinite(total) else math.inf)
    return found


def sweep(widths: Sequence[int], rates: Sequence[float], runs: str) -> list[dict[str, Any]]:
    """For each optimizer and width, the losses at the rates and the best of them."""
    dataset = run.data.open(run.sequence, Path(runs) / ".cache" / "data")
    found = []
    for width in widths:
        for name, optimizer in OPTIMIZERS.items():
            if width == BASE and found:  # the optimizers are the same
                reached = found[0]["losses"]
            else:
                reached = losses(dataclasses.replace(run, model=sized(width), optimizer=optimizer), rates, dataset)
            best = rates[int(np.argmin(reached))]
            found.append(dict(optimizer=name, width=width, rates=list(rates), losses=reached, best=best))
            print(f"{name:>6} {width:>5} " + " ".join(f"{x:8.4f}" for x in reached) + f"   best {best:.5f}", flush=True)
    return found


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """The losses against the rate, a panel for each optimizer and a line for each width, the best marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(OPTIMIZERS), figsize=(10, 4.2), sharey=True, layout="constrained")
    widths = sorted({row["width"] for row in found})
    colours = dict(zip(widths, pyplot.colormaps["viridis"](np.linspace(0.1, 0.85, len(widths))), strict=True))
    for panel, name in zip(panels, OPTIMIZERS, strict=True):
        for row in (row for row in found if row["optimizer"] == name):
            colour = colours[row["width"]]
            panel.plot(row["rates"], row["losses"], marker="o", markersize=3, color=colour, label=f"{row['width']}")
            panel.plot(row["best"], min(row["losses"]), marker="*", markersize=14, color=colour)
        panel.set_xscale("log", base=2)
        panel.set(title=name, xlabel="learning rate")
    panels[0].set_ylabel(f"held-out nats per byte, {run.steps} steps")
    panels[-1].legend(title="width")
    figure.savefig(path, dpi=150)


def main(
    widths: tuple[int, ...] = WIDTHS,
    rates: tuple[float, ...] = RATES,
    runs: str = "runs",
    json: Path | None = None,
    png: Path | None = None,
) -> None:
    """Trains all of it, prints a table, and writes figures and a picture.

    Args:
      widths: Of the stream, each a multiple of 32, the smallest first.
      rates: Learning rates.
      runs: Folder that holds the tokens of the text.
      json: Where to write the figures.
      png: Where to draw them, with matplotlib (the extra `plots`).
    """
    print(" " * 13 + " ".join(f"{rate:8.5f}" for rate in rates))
    found = sweep(widths, rates, runs)
    if json:
        json.write_text(dumps(found, indent=1) + "\n")
    if png:
        draw(found, png)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
