"""`llmjax data`: builds token stores."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import tyro

from llmjax.data.build import Build, build, summary
from llmjax.errors import DONE
from llmjax.train.display import Display


@dataclasses.dataclass(frozen=True)
class Options:
    """Builds a token store from files, or goes on where a build was stopped."""

    out: tyro.conf.Positional[str]
    "Folder of the store; OUT.unfinished holds it until it is whole."
    build: Annotated[Build, tyro.conf.arg(name="")] = Build()
    workers: int = 0
    "Processes; 0: one for each core. The store has the same bytes with any number."


def data(asked: Options, display: Display | None = None) -> int:
    """Builds the store, says what came of it; returns an exit code.

    Raises:
      Refused: as `llmjax.data.build.build`.
    """
    display = display or Display()
    out = Path(asked.out).expanduser()
    record = build(asked.build, out, asked.workers or os.cpu_count() or 1, display.say).record
    display.say(f"{out}: {summary(record)}.")
    for reason, count in record["bad"].items():
        display.say(f"  left out {count:,}: {reason}")
    if record["empty"]:
        display.say(f"  left out {record['empty']:,} documents without text")
    return DONE
