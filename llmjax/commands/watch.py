"""`llmjax watch`: runs as they go, in the terminal."""

import dataclasses
import time

import tyro
from rich.console import Console
from rich.live import Live

from llmjax.errors import DONE, Refused
from llmjax.report import record
from llmjax.report.terminal import together

ROWS = 21  # of a run that is printed


@dataclasses.dataclass(frozen=True)
class Options:
    """Shows the curve, the speed, the processes and the last events of runs, as they go; Ctrl-C ends it.

    It only reads, so any number of people may watch, over ssh as well. Where there is no terminal it prints once.
    """

    run: tyro.conf.Positional[tuple[str, ...]]
    "Names of runs, or paths of their directories."
    every: float = 2.0
    "Seconds between two looks."
    once: bool = False
    "Print what is there and end."
    runs: str = "runs"
    "Folder that holds run directories."


def watch(asked: Options, console: Console | None = None) -> int:
    """Shows the runs until all are finished or Ctrl-C is pressed; returns an exit code.

    Raises:
      Refused: there is no such run, or it holds nothing that a run writes.
    """
    console = console or Console(highlight=False)
    if not asked.run:
        raise Refused("watch names no run: give the name of one, or of several.")
    if not asked.every > 0:
        raise Refused(f"every is {asked.every}: give a number of seconds.")
    folders = [record.where(name, asked.runs) for name in dict.fromkeys(asked.run)]
    records = [record.read(folder) for folder in folders]
    try:
        if console.is_terminal and not asked.once:
            with Live(together(records, *console.size), console=console, screen=True, auto_refresh=False) as live:
                while any(each.state != "finished" for each in records):
                    time.sleep(asked.every)
                    records = [record.read(folder) for folder in folders]
                    live.update(together(records, *console.size), refresh=True)
    except KeyboardInterrupt:  # how one stops to watch
        pass
    console.print(together(records, console.width, ROWS * len(records)))
    return DONE
