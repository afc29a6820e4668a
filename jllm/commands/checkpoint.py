"""`jllm checkpoint list|verify FOLDER`: which checkpoints of a run are there, and whether they are intact."""

import dataclasses
from pathlib import Path

from jllm.errors import UserError, say
from jllm.options import command, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Options of `checkpoint`."""

    action: str = option(dataclasses.MISSING, help="what to do", choices=("list", "verify"), positional=True)
    folder: Path = option(
        dataclasses.MISSING, help="the --checkpoint folder of a run, or one checkpoint in it", positional=True
    )


@command(CheckpointConfig, name="checkpoint")
def main(config: CheckpointConfig) -> None:
    """List the complete checkpoints of a run, or read every byte of them and compare it with its checksum."""
    from jllm.train.checkpoint.verify import describe, find, verify

    found = find(config.folder)
    if config.action == "list":
        for folder in found:
            say(describe(folder))
        return
    problems = {}
    for folder in found:
        problems[folder] = verify(folder)
        say(f"{folder.name}: {'damaged' if problems[folder] else 'every byte is what was written'}")
    damaged = [problem for each in problems.values() for problem in each]
    if damaged:
        good = [folder for folder in found if not problems[folder]]
        advice = "use another checkpoint"
        if found != [config.folder]:  # else the others were not looked at
            advice = f"the newest good one is {good[-1]}" if good else "none of them is good"
        raise UserError("; ".join([*damaged, advice]))
