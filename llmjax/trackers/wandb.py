"""Weights & Biases, on the machine alone or on its servers (pip install 'llmjax[wandb]')."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

from llmjax.tracking import About, identity, installed


@dataclasses.dataclass(frozen=True)
class WandB:
    """Files in `wandb/` of the folder of runs; `wandb sync` sends what was written offline.

    The key comes from `wandb login`. Nothing of the machine, the environment or the command line is sent along.
    """

    project: str = "llmjax"
    mode: Literal["offline", "online"] = "offline"

    def ready(self) -> None:
        """Whether wandb is installed."""
        installed("wandb", "wandb")

    def open(self, about: About) -> "Board":
        """A run of the id that is kept in `wandb/` of the run directory: every start of a run continues one curve."""
        return Board(self, about)


class Board:
    """A run of wandb, whose steps are a number like the others, as its own count refuses to go back."""

    def __init__(self, how: WandB, about: About):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        # It links to log files elsewhere, so its own are not in the run directory, where a link is refused.
        quiet = wandb.Settings(
            silent=True, console="off", symlink=False, disable_git=True, disable_code=True, save_code=False,
            disable_job_creation=True, x_disable_meta=True, x_disable_machine_info=True, x_save_requirements=False,
        )  # fmt: skip
        self.run: Any = wandb.init(
            project=how.project, mode=how.mode, name=about.name, id=identity(about.folder / "wandb")[0],
            resume="allow", dir=str(about.folder.parent), config=dict(about.config), settings=quiet,
        )  # fmt: skip
        self.run.define_metric("*", step_metric="step")

    def metrics(self, step: int, numbers: Mapping[str, float]) -> None:
        """One row of its history."""
        self.run.log({"step": step, **numbers})

    def text(self, step: int, name: str, text: str) -> None:
        """A file of the run."""
        from wandb import Html

        escaped = text.replace("&", "&amp;").replace("<", "&lt;")
        self.run.log({"step": step, name: Html(f"<pre>{escaped}</pre>", inject=False)})

    def close(self) -> None:
        """Waits until all is on the disk, or on the server."""
        self.run.finish()


tracker = WandB()
