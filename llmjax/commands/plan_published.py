"""`llmjax plan --published`: speeds that others have published, predicted."""

import dataclasses

from llmjax.plan import fit, published
from llmjax.plan.fit import Accuracy
from llmjax.plan.slices import chips
from llmjax.train.display import Display


def show(path: str, display: Display) -> dict:
    """Prints every row of the table beside its prediction, the accuracy for every chip, and what is left out and why.

    Raises:
      Refused: the file is no table of published runs, or no row of it can be predicted.
    """
    rows, left_out = published.read(path, list(chips().values()))
    cells = [
        [row.name, row.run.mesh.chip.name, f"{row.step:,.3f}", f"{row.predicted().step:,.3f}", percent(row.error())]
        for row in rows
    ]
    display.table(["published run", "chip", "published s/step", "predicted", "error"], cells)
    found = {family: (fit.accuracy(row.error() for row in members), members) for family, members in
             fit.families(rows).items()}  # fmt: skip
    held_out = {family: fit.held_out(members) for family, (_, members) in found.items()}
    whole = fit.accuracy(row.error() for row in rows)
    lines = [[family, *columns(one), percent(held_out[family])] for family, (one, _) in found.items()]
    display.say()
    title = ["chips with the same constants", "rows", "mean error", "within 20%", "fitted on half, on the other half"]
    display.table(title, [*lines, ["all", *columns(whole), ""]])
    reasons: dict[str, list[str]] = {}
    for name, why in left_out.items():
        reasons.setdefault(why, []).append(name)
    display.say()
    display.facts(f"Left out: {len(left_out)}", {why: ", ".join(names) for why, names in sorted(reasons.items())})
    return dict(
        rows=[dict(id=r.name, published=r.step, predicted=r.predicted().step, error=r.error()) for r in rows],
        chips={family: dataclasses.asdict(one) for family, (one, _) in found.items()},
        held_out=held_out, all=dataclasses.asdict(whole), left_out=left_out,
    )  # fmt: skip


def columns(one: Accuracy) -> list[str]:
    return [str(one.rows), f"{100 * one.mean:.1f}%", f"{100 * one.within:.0f}%"]


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:+.1f}%" if share < 0 else f"{100 * share:.1f}%"
