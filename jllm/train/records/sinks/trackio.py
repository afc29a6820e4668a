"""trackio, through its own package; what its environment variables say (folder, space, server) holds."""

import os
from pathlib import Path
from typing import Any

from jllm.train.records.sinks.reported_run import ReportedRun


class Trackio:
    """A run of trackio's whose name is the id of ours, by which it is found when a run goes on."""

    name = "trackio"

    def __init__(self, run: ReportedRun) -> None:
        self._reported = run
        self._run: Any = None

    def begin(self) -> None:
        """Open the run, or go on with the one of this name."""
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "jllm"),
            name=self._reported.id,
            config=self._reported.options,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def numbers(self, numbers: dict[str, float], step: int) -> None:
        """Log them."""
        self._run.log(numbers, step=step)

    def artefact(self, kind: str, folder: Path, step: int) -> None:
        """An artifact of the run: a reference to the folder, or its files."""
        import trackio

        metadata = {"step": step, "folder": str(folder.resolve())}
        artifact = trackio.Artifact(f"{kind}-{self._reported.id}", type=kind, metadata=metadata)
        if self._reported.with_files:
            artifact.add_dir(str(folder))
        else:
            artifact.add_reference(folder.resolve().as_uri())
        self._run.log_artifact(artifact, aliases=[f"step-{step}"])

    def end(self) -> None:
        """Close the run."""
        self._run.finish()
