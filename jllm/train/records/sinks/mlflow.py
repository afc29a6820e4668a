"""MLflow, through its own package; what its environment variables say (tracking URI, experiment) holds.

A run of ours is found by a tag, so that going on goes on in the same run of MLflow's.
"""

import os
import re
import time
from pathlib import Path
from typing import Any

from jllm.train.records.sinks.reported_run import ReportedRun

RUN_TAG = "jllm.run"
MOST_METRICS, MOST_PARAMETERS = 1000, 100
"""What MLflow takes in one call."""
_NOT_IN_NAMES = re.compile(r"[^\w\-./ :]")


class Mlflow:
    """A run of MLflow's with the id of ours as a tag."""

    name = "mlflow"

    def __init__(self, run: ReportedRun) -> None:
        self._reported = run
        self._client: Any = None
        self._id = ""

    def begin(self) -> None:
        """Open the run, or go on with the one that has the tag."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "jllm")
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        tag = f"tags.`{RUN_TAG}` = '{self._reported.id}'"
        found = self._client.search_runs([experiment_id], filter_string=tag, max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        run = self._client.create_run(experiment_id, run_name=self._reported.name, tags={RUN_TAG: self._reported.id})
        self._id = run.info.run_id
        options = [Param(key, str(value)[:500]) for key, value in self._reported.options.items() if value is not None]
        for at in range(0, len(options), MOST_PARAMETERS):
            self._client.log_batch(self._id, params=options[at : at + MOST_PARAMETERS])

    def numbers(self, numbers: dict[str, float], step: int) -> None:
        """Log them."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_NOT_IN_NAMES.sub("_", name), value, now, step) for name, value in numbers.items()]
        for at in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[at : at + MOST_METRICS])

    def artefact(self, kind: str, folder: Path, step: int) -> None:
        """An artifact of the run: a note that says where the folder is, or its files."""
        place = f"{kind}/step-{step:08d}"
        if self._reported.with_files:
            self._client.log_artifacts(self._id, str(folder), place)
        else:
            self._client.log_dict(self._id, {"step": step, "folder": str(folder.resolve())}, f"{place}.json")

    def end(self) -> None:
        """Close the run."""
        self._client.set_terminated(self._id)
