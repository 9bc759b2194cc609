"""`llmjax goodput`: where the wall time of a run went."""

import dataclasses
import json
from pathlib import Path

import tyro

from llmjax.errors import DATA, DONE, Refused
from llmjax.report.goodput import WORDS, of
from llmjax.rundir import find
from llmjax.train.display import Display, duration
from llmjax.train.records import read


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the wall time of a run went, from its own records."""

    run: tyro.conf.Positional[str]
    "Name of a run, or the path of its directory."
    runs: str = "runs"
    "Folder that holds run directories."
    json: str = ""
    "File to write the same to."


def goodput(asked: Options, display: Display | None = None) -> int:
    """Prints the table; returns an exit code.

    Raises:
      Refused: there is no such run, it never came to train, or an older version began it.
    """
    folder, display = find(asked.run, asked.runs), display or Display()
    found = of(read(folder / "events.jsonl"), read(folder / "metrics.jsonl"))
    if not found.starts:
        raise Refused(f"{folder} has not come to train yet: there is no time to account for.", DATA)
    display.say(
        f"{folder}: {duration(found.wall)} since the first start, {found.starts} start{'s' * (found.starts > 1)}, "
        f"{found.redone} steps done again, {found.skipped} skipped"
    )
    rows = sorted(found.buckets.items(), key=lambda item: (item[0] != "steps", -item[1]))
    cells = [[WORDS[name], f"{seconds:,.1f}", f"{100 * seconds / found.wall:.1f}%"] for name, seconds in rows]
    display.table(["spent on", "seconds", "share"], [*cells, ["wall time", f"{found.wall:,.1f}", "100.0%"]])
    if asked.json:
        Path(asked.json).write_text(
            json.dumps(dataclasses.asdict(found) | dict(goodput=found.share), indent=1) + "\n", encoding="utf-8"
        )
    return DONE
