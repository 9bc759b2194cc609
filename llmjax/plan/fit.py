"""The constants of a chip that make the analytic model agree with published runs, and how well they hold on others."""

import dataclasses
import random
from collections.abc import Iterable, Sequence

from llmjax.mesh import Efficiency
from llmjax.plan.published import Published

# (least, most, where to stay if the runs do not say): few runs decide few constants.
FITTED = {
    "matmul": (0.3, 0.9, 0.75),
    "attention": (0.1, 0.9, 0.45),
    "memory": (0.4, 0.95, 0.8),
    "overlap": (0.0, 0.97, 0.5),
    "doubling": (0.0, 0.06, 0.015),
}
PULL = 0.01  # of the mean error, to move a constant from one end of its range to the other
FAR = 0.18  # errors beyond this count half again


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How far predictions are from what was published."""

    rows: int
    mean: float
    "Mean absolute error, of the published time."
    within: float
    "The share of rows whose error is at most 20 %."


def accuracy(errors: Iterable[float]) -> Accuracy:
    """Of at least one row."""
    sizes = [abs(error) for error in errors]
    return Accuracy(len(sizes), sum(sizes) / len(sizes), sum(size <= 0.2 for size in sizes) / len(sizes))


def families(rows: Iterable[Published]) -> dict[str, list[Published]]:
    """The rows by chip; chips that share their constants are one family, named by the first."""
    found: dict[Efficiency, list[Published]] = {}
    for row in rows:
        found.setdefault(row.run.mesh.chip.efficiency, []).append(row)
    return {members[0].run.mesh.chip.name: members for members in found.values()}


def fit(rows: Sequence[Published]) -> Efficiency:
    """The constants with the least mean error, found by moving one at a time by ever smaller steps."""
    best = Efficiency(**{name: start for name, (_, _, start) in FITTED.items()})
    least, steps = _misfit(rows, best), {name: (high - low) / 8 for name, (low, high, _) in FITTED.items()}
    while max(steps.values()) > 4e-3:
        before = least
        for name, (low, high, _) in FITTED.items():
            for step in (steps[name], -steps[name]):
                moved = min(high, max(low, getattr(best, name) + step))
                tried = dataclasses.replace(best, **{name: moved})
                if (misfit := _misfit(rows, tried)) < least - 1e-6:
                    best, least = tried, misfit
        if least == before:
            steps = {name: step / 2 for name, step in steps.items()}
    return best


def _misfit(rows: Sequence[Published], constants: Efficiency) -> float:
    errors = [abs(row.error(constants)) for row in rows]
    errors = [error + max(0.0, error - FAR) / 2 for error in errors]
    moved = (abs(getattr(constants, name) - start) / (high - low) for name, (low, high, start) in FITTED.items())
    return sum(errors) / len(errors) + PULL * sum(moved)


def held_out(rows: Sequence[Published], times: int = 3) -> float | None:
    """Mean absolute error on one half of the rows with constants fitted on the other, over random halves.

    None for a single row, which cannot be halved.
    """
    if len(rows) < 2:
        return None
    errors = []
    for seed in range(times):
        mixed = random.Random(seed).sample(list(rows), len(rows))
        half = len(mixed) // 2
        for known, judged in ((mixed[:half], mixed[half:]), (mixed[half:], mixed[:half])):
            constants = fit(known)
            errors += [abs(row.error(constants)) for row in judged]
    return sum(errors) / len(errors)
