"""The options of a run in its log folder, as a TOML file that `--config` reads.

`config.toml` is of the run's first start. A run that goes on leaves that and writes `config-from-step-00000006.toml`
beside it, so every step has the options it was made with. Records of steps that are about to be repeated are dropped,
as those in `metrics.jsonl` are.
"""

import json
from pathlib import Path
from typing import Any

from jllm import __version__, atomic
from jllm.options import OF_THE_CALL
from jllm.train.config import TrainConfig, resolved_options
from jllm.train.shape import RunShape, automatic_options

FIRST_NAME = "config.toml"
LATER_NAME = "config-from-step-{step:08d}.toml"


def record_options(folder: Path, config: TrainConfig, shape: RunShape, *, first_step: int) -> None:
    """Write what this start of a run was given."""
    folder.mkdir(parents=True, exist_ok=True)
    name = FIRST_NAME if first_step == 1 else LATER_NAME.format(step=first_step)
    atomic.write_text(folder / name, toml_of(config, shape))
    for later in folder.glob(LATER_NAME.replace("{step:08d}", "*")):
        if first_step == 1 or later.name > name:
            later.unlink()


def toml_of(config: TrainConfig, shape: RunShape) -> str:
    """The options, with comments for what was not given: the value it got, or none."""
    automatic = automatic_options(config, shape)
    lines = [f"# jllm {__version__}, {shape.processes} on {shape.mesh.world_size} processes, started in {Path.cwd()}"]
    for key, value in resolved_options(config).items():
        if key in OF_THE_CALL:
            continue
        if value is not None:
            lines.append(f"{key} = {_toml(value)}")
        elif key in automatic:
            lines.append(f"# {key} = {_toml(automatic[key])}, not given")
        else:
            lines.append(f"# {key} is not given")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """A value of an option as TOML writes it: JSON's way for all that options have, but for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
