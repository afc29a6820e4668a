"""`jllm merge`: a LoRA adapter added to its model, as a model folder of its own."""

import dataclasses
from pathlib import Path

from jllm.atomic import check_new_folder
from jllm.errors import UserError, say
from jllm.machine import require_package
from jllm.options import command, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Options of `merge`."""

    model: Path = option(dataclasses.MISSING, "-m", help="Hugging Face folder of the model that the adapter is for")
    lora: Path = option(dataclasses.MISSING, "-l", help="peft folder of the adapter")
    output: Path = option(dataclasses.MISSING, "-o", help="where the merged Hugging Face folder is written")
    scale: float = option(
        1.0, help="what is added is multiplied by it; -1 takes a merged adapter out again", least=-1e6, most=1e6
    )

    def __post_init__(self) -> None:
        # What a look at the folders tells is said before anything large is imported.
        if not (self.model / "config.json").is_file():
            missing = "has no config.json" if self.model.is_dir() else "does not exist"
            raise UserError(f"--model {self.model}: {missing}; give a Hugging Face model folder")
        if not (self.lora / "adapter_config.json").is_file():
            missing = "has no adapter_config.json" if self.lora.is_dir() else "does not exist"
            raise UserError(f"--lora {self.lora}: {missing}; give a folder that peft or the trainer wrote")
        if self.scale == 0:
            raise UserError("--scale 0: adds nothing; give another number")
        check_new_folder(self.output, "--output")


@command(MergeConfig, name="merge")
def main(config: MergeConfig) -> None:
    """Add a LoRA adapter to the weights of its model, tensor by tensor: what is written computes what the two compute
    together, and needs no adapter. Tensors without an adapter keep every byte; a model in 4 or 8 bits (bitsandbytes)
    becomes one in bf16. The model itself is not changed."""
    require_package("peft", "jllm merge", "adapters")
    from jllm.models.adapters.merging import merge

    done = merge(config.model, config.lora, config.output, scale=config.scale)
    for note in done.notes:
        say(note)
    say(f"wrote {config.output}: {done.changed} of {done.total} tensors changed")
