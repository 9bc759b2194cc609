"""`llmjax report`: one or several runs as a page and as pictures."""

import dataclasses
import os
from pathlib import Path

import tyro

from llmjax.errors import DONE, IO, Refused
from llmjax.report import pictures, record
from llmjax.report.page import page
from llmjax.train.display import Display, memory


@dataclasses.dataclass(frozen=True)
class Options:
    """Draws runs: one HTML file that needs no network, and PNGs where matplotlib is installed.

    Runs may be running, unfinished or damaged; what cannot be read is left out, and the page says so.
    """

    run: tyro.conf.Positional[tuple[str, ...]]
    "Names of runs, or paths of their directories; several are compared."
    out: str = ""
    "Folder for index.html and the pictures; empty: report/ in the run's directory, of several below RUNS/reports/."
    runs: str = "runs"
    "Folder that holds run directories."


def report(asked: Options, display: Display | None = None) -> int:
    """Writes the page; returns an exit code.

    Raises:
      Refused: there is no such run, it holds nothing that a run writes, or the folder cannot be written.
    """
    display = display or Display()
    if not asked.run:
        raise Refused("report names no run: give the name of one, or of several to compare.")
    folders = [record.where(name, asked.runs) for name in dict.fromkeys(asked.run)]
    records = [record.read(folder) for folder in folders]
    out = Path(asked.out) if asked.out else place(folders, asked.runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        scratch = out / "index.html.new"
        scratch.write_text(page(records), encoding="utf-8", errors="replace")
        os.replace(scratch, out / "index.html")
        drawn = pictures.draw(records, out) if pictures.available() else []
    except OSError as error:
        raise Refused(f"{out} cannot be written ({error.strerror}): choose another folder, --out.", IO) from error
    for each in records:
        for note in each.notes:
            display.say(f"{each.name}: {note}")
    display.say(f"{out / 'index.html'}  {memory((out / 'index.html').stat().st_size)}, open it in a browser")
    for path in drawn:
        display.say(str(path))
    if not pictures.available():
        display.say("No PNGs: matplotlib is not installed, pip install 'llmjax[plots]'.")
    return DONE


def place(folders: list[Path], runs: str) -> Path:
    """Where the report of these runs goes unless asked otherwise."""
    if len(folders) == 1:
        return folders[0] / "report"
    return Path(runs) / "reports" / "+".join(folder.absolute().name for folder in folders)[:200]
