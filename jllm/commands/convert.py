"""`jllm convert`: an older checkpoint, whose code transformers no longer carries, in the nearest native class.

The trainer accepts such a folder directly; converting is for other tools. Cost: one pass over the weights.
"""

import dataclasses
from pathlib import Path

from jllm.atomic import check_new_folder
from jllm.errors import UserError, say
from jllm.machine import require_package
from jllm.options import command, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """The options of `jllm convert`."""

    model: Path = option(dataclasses.MISSING, "-m", help="folder of a Qwen-1, InternLM2 or Baichuan checkpoint")
    output: Path = option(dataclasses.MISSING, "-o", help="where the native Hugging Face folder is written")

    def __post_init__(self) -> None:
        # What a look at the folders tells is said before anything large is imported.
        if not (self.model / "config.json").is_file():
            missing = "has no config.json" if self.model.is_dir() else "does not exist"
            raise UserError(f"--model {self.model}: {missing}; give a Hugging Face model folder")
        check_new_folder(self.output, "--output")


@command(ConvertConfig, name="convert")
def main(config: ConvertConfig) -> None:
    """Rename and split an older checkpoint's tensors so that plain transformers loads it."""
    require_package("torch", "jllm convert", "train")
    from jllm.models.legacy.rewriting import convert_checkpoint

    name = convert_checkpoint(config.model, config.output)
    say(f"wrote {config.output} as {name}")
