"""`jllm plot RUN`: loss, learning rate, speed and gradient norm of a run, drawn into one file."""

import dataclasses
from pathlib import Path

from jllm.errors import UserError
from jllm.options import command, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Options of `plot`."""

    runs: tuple[Path, ...] = option(
        dataclasses.MISSING, help="folders of runs, or metrics.jsonl files", positional=True
    )
    output: Path | None = option(None, "-o", help=".html or .png file to write [default: plot.html beside the records]")

    def __post_init__(self) -> None:
        if self.output is not None and self.output.suffix.lower() not in (".html", ".png"):
            raise UserError(f'--output {self.output}: its name must end in ".html" or ".png"')


@command(PlotConfig, name="plot")
def main(config: PlotConfig) -> None:
    """Draw loss, learning rate, speed and gradient norm of RUNS (log folders, folders with log/metrics.jsonl, or the
    files themselves; several are overlaid) into one HTML or PNG file."""
    from jllm.train.records.curves import plot

    print(f"wrote {plot(list(config.runs), config.output)}")
