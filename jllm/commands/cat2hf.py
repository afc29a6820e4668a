"""`jllm cat2hf`: a checkpoint of the trainer as one Hugging Face folder."""

import dataclasses
import sys
from pathlib import Path

from jllm.atomic import check_new_folder
from jllm.errors import UserError, say
from jllm.machine import require_package
from jllm.options import command, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cat2hfConfig:
    """Options of `cat2hf`."""

    checkpoint: Path = option(
        dataclasses.MISSING, "-C", help="the --checkpoint folder of a run, or one checkpoint in it"
    )
    hf: Path = option(dataclasses.MISSING, "-H", "--output", "-o", help="where the Hugging Face folder is written")
    model: Path | None = option(
        None, "-m", help="the model that the run went on from [default: the folder that the checkpoint names]"
    )
    tag: str | None = option(None, help="which checkpoint of the folder: a step, or a name [default: the newest]")
    trust_remote_code: bool = option(False, help="run code in the model's folder")

    def __post_init__(self) -> None:
        if not self.checkpoint.is_dir():
            raise UserError(f"--checkpoint {self.checkpoint}: no such folder; give the one that the run's had")
        check_new_folder(self.hf, "--hf")


@command(Cat2hfConfig, name="cat2hf")
def main(config: Cat2hfConfig) -> None:
    """Make one Hugging Face folder of a checkpoint, whatever the number of processes that wrote it: the model, or of a
    run with adapters a peft folder. One process does it, a tensor at a time, without DeepSpeed; every byte that is
    read is compared with its checksum."""
    require_package("torch", "jllm cat2hf", "train")
    from jllm.train.checkpoint.to_folder import to_folder

    done = to_folder(
        config.checkpoint, config.hf, model=config.model, tag=config.tag, trust_remote_code=config.trust_remote_code
    )
    if not done.has_checksums:
        say(f"warning: {done.checkpoint} is of format 1, without checksums: nothing was verified", file=sys.stderr)
    say(f"wrote {config.hf}: {done.what} of {done.checkpoint}, after step {done.step:,}")
