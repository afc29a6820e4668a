"""Weights & Biases, through its own package; what its environment variables say (mode, project, key) holds.

Numbers are logged over a `step` of their own, so that a run that goes on may repeat steps, which W&B's own counter
does not take.
"""

import os
from pathlib import Path
from typing import Any

from jllm.train.records.sinks.reported_run import ReportedRun


class Wandb:
    """A run of W&B's with the id of ours."""

    name = "wandb"

    def __init__(self, run: ReportedRun) -> None:
        self._reported = run
        self._run: Any = None

    def begin(self) -> None:
        """Open the run, or go on with the one of this id."""
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            # The package would ask on the terminal of the run.
            raise ConnectionError("not logged in; run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline")
        run = self._reported
        if run.folder is not None:
            run.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "jllm"),
            id=run.id,
            name=os.environ.get("WANDB_NAME", run.name),
            resume="allow",
            dir=None if run.folder is None else str(run.folder),
            config=run.options,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def numbers(self, numbers: dict[str, float], step: int) -> None:
        """Log them."""
        self._run.log({**numbers, "step": step})

    def artefact(self, kind: str, folder: Path, step: int) -> None:
        """An artifact of the run: a reference to the folder, or its files."""
        import wandb

        metadata = {"step": step, "folder": str(folder.resolve())}
        artifact = wandb.Artifact(f"{kind}-{self._reported.id}", type=kind, metadata=metadata)
        if self._reported.with_files:
            artifact.add_dir(str(folder))
        else:
            artifact.add_reference(folder.resolve().as_uri(), checksum=False)
        self._run.log_artifact(artifact, aliases=["latest", f"step-{step}"])

    def end(self) -> None:
        """Close the run."""
        self._run.finish()
