"""How much sooner Muon is where a tuned AdamW ends: `chars_adamw` against `chars_muon` over three seeds.

    python -m experiments.learning --json learning.json

AdamW trains for 2,000 steps; Muon, in a run of its own length, is evaluated as it goes, and the first evaluation on all
held-out text that is no worse counts. Time is that of the training steps up to there, the compiling first one left out.

On two virtual cores of an AMD EPYC (Zen 5, 2026-11-28, Python 3.11, jax 0.10.2; 6 min): seed 0 after 59 % of the steps
and 71 % of the time, seed 1 after 60 %, with the last step, and 70 %, seed 2 after 58 % and 73 %. A step of Muon takes
1.21 times as long as one of AdamW. Where AdamW was with half a cosine, before its schedule was tuned (1.3024, 1.2993
and 1.2988 nats), they are after 1,100, 1,125 and 1,150 steps.
"""

import dataclasses
from json import dumps
from pathlib import Path

from experiments import chars_adamw, chars_muon
from llmjax.run import Run

run = chars_muon.run  # for `llmjax train learning`

EVERY = 25  # steps between two evaluations of Muon
ALL = 1 << 20  # rows of an evaluation: more than there are


def trained(run: Run) -> list[dict[str, float]]:
    """The metrics of a run, which is trained unless it is finished."""
    from llmjax.commands.train import train
    from llmjax.train.records import read

    train(run)
    return read(run.folder() / "metrics.jsonl")


def seconds(metrics: list[dict[str, float]], steps: int) -> float:
    """Time of the first steps, but for those that compiled."""
    taken = [m for m in metrics if "step_ms" in m and m["step"] <= steps and "compiled" not in m]
    return sum(m["step_ms"] for m in taken) / 1e3


def compare(seed: int, runs: str) -> dict[str, float | None]:
    """AdamW's end, and where Muon passes it; None where it does not."""
    also = dict(seed=seed, runs=runs)
    adamw = trained(dataclasses.replace(chars_adamw.run, name=f"learning_adamw_{seed}", **also))
    muon = trained(
        dataclasses.replace(chars_muon.run, name=f"learning_muon_{seed}", eval_every=EVERY, eval_rows=ALL, **also)
    )
    [target] = [m["eval_loss"] for m in adamw if "eval_loss" in m]
    reached = min((m["step"] for m in muon if "eval_loss" in m and m["eval_loss"] <= target), default=None)
    steps, whole = chars_adamw.run.steps, seconds(adamw, chars_adamw.run.steps)
    return dict(
        seed=seed,
        adamw_loss=target,
        muon_loss=muon[-1]["eval_loss"],
        reached=reached,
        steps_ratio=reached and reached / steps,
        time_ratio=reached and seconds(muon, reached) / whole,
        adamw_seconds=whole,
        muon_seconds=seconds(muon, chars_muon.run.steps),
    )


def main(seeds: int = 3, runs: str = "runs", json: Path | None = None) -> None:
    """Compares, prints a table and writes it.

    Args:
      seeds: How many.
      runs: Folder that holds run directories; what is finished there is not trained again.
      json: Where to write the figures.
    """
    found = [compare(seed, runs) for seed in range(seeds)]
    for line in (list(found[0]), *(row.values() for row in found)):
        print("  ".join(f"{x:>13.3f}" if isinstance(x, float) else f"{x!s:>13}" for x in line))
    if json:
        json.write_text(dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    import tyro

    from llmjax import allocator

    allocator.start_again()
    tyro.cli(main)
