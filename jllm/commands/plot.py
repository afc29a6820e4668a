"""`jllm plot RUN`: the curves of runs, and the timelines of traced steps, drawn into one file."""

import dataclasses
from pathlib import Path

from jllm.errors import UserError, say
from jllm.options import command, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Options of `plot`."""

    runs: tuple[Path, ...] = option(
        dataclasses.MISSING, help="folders of runs, metrics.jsonl files, or trace-step-N.json files", positional=True
    )
    output: Path | None = option(None, "-o", help=".html or .png file to write [default: plot.html beside the records]")
    smooth: float = option(
        0.0, help="running mean of noisy training curves: the weight of what came before, such as 0.9; 0: as they are"
    )
    x: str = option("step", help="what runs to the right", choices=("step", "tokens", "hours"))
    log_x: bool = option(False, help="logarithmic axis to the right")
    log_y: bool = option(False, help="logarithmic axes upwards; what is not above 0 is left out")

    def __post_init__(self) -> None:
        if self.output is not None and self.output.suffix.lower() not in (".html", ".png"):
            raise UserError(f'--output {self.output}: its name must end in ".html" or ".png"')
        if not 0 <= self.smooth < 1:
            raise UserError(f"--smooth {self.smooth}: it must be at least 0 and below 1")


@command(PlotConfig, name="plot")
def main(config: PlotConfig) -> None:
    """Draw RUNS (log folders, folders with log/metrics.jsonl, or the files themselves; several are overlaid) into one
    HTML or PNG file: loss, learning rate, speed, evaluations, memory, and the timelines of steps that --trace_step
    traced."""
    from jllm.train.records.curves import Look, plot

    look = Look(smooth=config.smooth, x=config.x, log_x=config.log_x, log_y=config.log_y)
    say(f"wrote {plot(list(config.runs), config.output, look)}")
