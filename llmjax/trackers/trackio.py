"""Trackio, a local dashboard: `trackio show` (pip install 'llmjax[trackio]')."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmjax.tracking import About, identity, installed


@dataclasses.dataclass(frozen=True)
class Trackio:
    """A run in Trackio's own folder of this machine, TRACKIO_DIR; nothing is sent anywhere."""

    project: str = "llmjax"

    def ready(self) -> None:
        """Whether trackio is installed."""
        installed("trackio", "trackio")

    def open(self, about: About) -> "Board":
        """A run named for the run and the id that is kept in `trackio/` of its directory."""
        return Board(self, about)


class Board:
    """A run of trackio, which finds the one to continue by its name."""

    def __init__(self, how: Trackio, about: About):
        import trackio

        name = f"{about.name}_{identity(about.folder / 'trackio')[0][:6]}"
        self.run: Any = trackio.init(
            how.project, name=name, config=dict(about.config), resume="allow", embed=False, auto_log_gpu=False,
            auto_log_cpu=False,
        )  # fmt: skip
        self.markdown = trackio.Markdown

    def metrics(self, step: int, numbers: Mapping[str, float]) -> None:
        """One row."""
        self.run.log(dict(numbers), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """A text in a row."""
        self.run.log({name: self.markdown("    " + text.replace("\n", "\n    "))}, step=step)

    def close(self) -> None:
        """Waits until all is in its database."""
        self.run.finish()


tracker = Trackio()
