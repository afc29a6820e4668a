"""What a service is told of a run when it begins."""

import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """What a service is told of a run when it begins.

    Attributes:
        id: the run's, which stays when it goes on.
        options: as JSON values.
        folder: of the records, where a package may keep its own; None where there is none.
        with_files: whether checkpoints and models are given to the service, not only where they lie.
    """

    id: str
    options: dict[str, Any]
    folder: Path | None
    with_files: bool

    @property
    def name(self) -> str:
        """For people."""
        place = self.options.get("checkpoint") or self.options.get("output_dir")
        return f"{Path(place).name} {self.id[:8]}" if place else self.id
