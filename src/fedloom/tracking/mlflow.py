"""MLflow, in a database of its own in the run's folder: `mlflow ui --backend-store-uri sqlite:///RUN/track/mlflow/...`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.tracking import numbers, settings

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec

DATABASE = "mlflow.db"
ROUND = "fedloom.round"  # the tag that says how far the numbers go
LONGEST = 500  # letters of a parameter, which is MLflow's own limit for older servers
ENDS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class Follower:
    """One MLflow run for the whole of a run, however often it stops; steps are rounds."""

    def __init__(self, folder: Path, done: int) -> None:
        self.folder, self.done = folder, done

    def begin(self, spec: Spec, manifest: Mapping[str, Any]) -> None:
        """Opens the MLflow run of this folder, or makes it."""
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when the package is imported
        from mlflow import MlflowClient

        self.folder.mkdir(parents=True, exist_ok=True)
        store = f"sqlite:///{(self.folder / DATABASE).resolve()}"
        self.client = MlflowClient(tracking_uri=store, registry_uri=store)
        found = self.client.get_experiment_by_name("fedloom")
        where = (self.folder / "artifacts").resolve().as_uri()
        experiment = found.experiment_id if found else self.client.create_experiment("fedloom", where)
        runs = self.client.search_runs([experiment], max_results=1)
        if runs:
            self.id = runs[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
        else:
            name = self.folder.parent.parent.name
            self.id = self.client.create_run(experiment, tags={ROUND: "0"}, run_name=name).info.run_id
            for key, value in settings(spec).items():
                self.client.log_param(self.id, key, str(value)[:LONGEST])
            for key in ("fedloom", "python", "torch", "numpy", "device", "command"):
                self.client.set_tag(self.id, key, str(manifest.get(key, "")))
        self.told = int(self.client.get_run(self.id).data.tags.get(ROUND, 0))

    def row(self, metrics: Mapping[str, Any]) -> None:
        """A metric for every number of the round; a round that was told before the run was killed is not told again."""
        from mlflow.entities import Metric, RunTag

        step = metrics["round"]
        if step <= self.told:
            return
        now = int(1000 * time.time())
        told = [Metric(name.replace("@", "/"), value, now, step) for name, value in numbers(metrics).items()]
        self.client.log_batch(self.id, told, tags=[RunTag(ROUND, str(step))])
        self.told = step

    def end(self, status: str, paths: Iterable[Path]) -> None:
        """Keeps the files and the status."""
        for path in paths:
            self.client.log_artifact(self.id, str(path))
        self.client.set_terminated(self.id, status=ENDS[status])
