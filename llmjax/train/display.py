"""What a person sees while a run trains: a bar on a terminal, plain lines anywhere else."""

import contextlib
import time
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

PLAIN_SECONDS = 10  # between two progress lines where there is no terminal


def count(number: float) -> str:
    """1234567 as "1.23 M"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def flop_rate(number: float) -> str:
    """FLOP/s with a decimal unit."""
    return f"{number / 1e12:.3g} TFLOP/s" if number >= 1e12 else f"{number / 1e9:.3g} GFLOP/s"


def memory(number: float) -> str:
    """Bytes with a binary unit."""
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:{'.0f' if number >= 999.5 * size else '.3g'}} {unit}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Display:
    """A resource: owns the console and the bar. A quiet one, for every process but the first, says nothing."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None):
        self.console = console or Console(quiet=quiet, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        self.said = 0.0

    def say(self, text: str = "") -> None:
        """One line; text in square brackets is shown as it is."""
        self.console.print(text, markup=False)

    def facts(self, title: str, rows: dict[str, str]) -> None:
        """A title and a list of names with values."""
        self.console.print(title, style="bold", markup=False)
        for name, value in rows.items():
            self.say(f"  {name:<{max(map(len, rows))}}  {value}")

    def table(self, columns: list[str], rows: list[list[str]]) -> None:
        """A small table: names to the left, numbers to the right."""
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        for style, cells in [("bold", columns), *((None, row) for row in rows)]:
            first, *others = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            self.console.print("   ".join([f"{first.strip():<{widths[0]}}", *others]), style=style, markup=False)

    def sample(self, prompt: str, text: str) -> None:
        """A prompt and what the model makes of it."""
        shown = Text(prompt, style="bold").append(text, style="not bold cyan")
        shown.rstrip()
        for line in shown.split("\n"):
            self.console.print(Text("  ").append_text(line) if line else "")
        self.say()

    def sample_as_made(self, prompt: str, pieces: Iterable[str]) -> None:
        """The same, with text that appears as it comes."""
        self.flow(f"  {prompt}", style="bold")
        for piece in pieces:
            self.flow(piece, style="cyan")
        self.say("\n")

    def flow(self, piece: str, style: str = "") -> None:
        """Text that goes on where the last left off, its lines set in."""
        self.console.print(Text(piece.replace("\n", "\n  "), style=style), end="")
        self.console.file.flush()

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Shows on a terminal what goes on, and for how long, until it is over; nothing elsewhere."""
        if self.console.is_terminal and not self.console.quiet:
            columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
            with Progress(*columns, console=self.console, transient=True) as bar:
                bar.add_task(what, total=None)
                yield
        else:
            yield

    @contextlib.contextmanager
    def progress(self, start: int, steps: int) -> Iterator[None]:
        """The bar, from `start` to `steps`."""
        if self.console.is_terminal and not self.console.quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total}  {task.fields[numbers]}"),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self.console, transient=True) as bar:
                self.bar, self.task = bar, bar.add_task("training", total=steps, completed=start, numbers="compiling")
                yield
            self.bar = None
        else:
            yield

    def step(self, step: int, steps: int, loss: float, tokens_per_s: float, step_ms: float, eta: float) -> None:
        """The numbers of one finished step."""
        numbers = f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s  {step_ms:.0f} ms/step"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, numbers=numbers)
        elif time.monotonic() - self.said >= PLAIN_SECONDS or step == steps:
            self.said = time.monotonic()
            self.say(f"step {step:>{len(str(steps))}}/{steps}  {numbers}  eta {duration(eta)}")
