"""MLflow, in a database beside the runs or on a server (pip install 'llmjax[mlflow]')."""

import dataclasses
import logging
import os
import time
from collections.abc import Mapping

from llmjax.tracking import About, identity, installed

LONGEST = 6000  # characters of a parameter, which MLflow refuses above


@dataclasses.dataclass(frozen=True)
class MLflow:
    """A run of an experiment of MLflow; `mlflow ui --backend-store-uri sqlite:///runs/mlflow.db` shows it."""

    store: str = ""
    "Tracking URI, such as http://host:5000. Empty: a SQLite file, mlflow.db, in the folder of runs."
    experiment: str = "llmjax"

    def ready(self) -> None:
        """Whether mlflow, and for a database what opens it, is installed."""
        installed("mlflow", "mlflow")
        if not self.store or self.store.startswith("sqlite:"):
            installed("sqlalchemy", "mlflow")

    def open(self, about: About) -> "Board":
        """The run whose id is kept in `mlflow/` of the run directory."""
        return Board(self, about)


class Board:
    """A run of MLflow, through the client alone: its global state stays untouched."""

    def __init__(self, how: MLflow, about: About):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # after the import, which sets it
        self._metric = Metric
        runs = about.folder.absolute().parent
        self.client = MlflowClient(tracking_uri=how.store or f"sqlite:///{runs / 'mlflow.db'}")
        files = None if how.store else (runs / "mlflow").as_uri()
        found = self.client.get_experiment_by_name(how.experiment)
        experiment = found.experiment_id if found else self.client.create_experiment(how.experiment, files)
        self.id = self._run(experiment, about)
        flat = {name: str(value)[:LONGEST] for name, value in flattened(about.config).items()}
        known = self.client.get_run(self.id).data.params
        new = [Param(name, value) for name, value in flat.items() if name not in known]  # one cannot be changed
        for at in range(0, len(new), 100):
            self.client.log_batch(self.id, params=new[at : at + 100])

    def _run(self, experiment: str, about: About) -> str:
        """The run of this run directory's, found by a tag, or a new one."""
        mine, new = identity(about.folder / "mlflow")
        found = () if new else self.client.search_runs([experiment], f"tags.llmjax = '{mine}'", max_results=1)
        if found:
            self.client.update_run(found[0].info.run_id, status="RUNNING")
            return found[0].info.run_id
        return self.client.create_run(experiment, tags={"llmjax": mine}, run_name=about.name).info.run_id

    def metrics(self, step: int, numbers: Mapping[str, float]) -> None:
        """One batch."""
        now = round(1e3 * time.time())
        self.client.log_batch(self.id, metrics=[self._metric(name, x, now, step) for name, x in numbers.items()])

    def text(self, step: int, name: str, text: str) -> None:
        """A file among the run's artifacts."""
        self.client.log_text(self.id, text, f"{name}/{step}.txt")

    def close(self) -> None:
        """Marks the run as ended."""
        self.client.set_terminated(self.id)


def flattened(value: object, path: str = "") -> dict[str, object]:
    """The leaves of a JSON value by dotted name."""
    if isinstance(value, Mapping):
        found: dict[str, object] = {}
        for name, inner in value.items():
            found |= flattened(inner, f"{path}.{name}" if path else name)
        return found
    return {path: value}


tracker = MLflow()
