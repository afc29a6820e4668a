"""`jllm adapter`: what an adapter does, and adapters for other programs."""

import dataclasses
from pathlib import Path

import click

from jllm.atomic import check_new_folder
from jllm.errors import UserError, say
from jllm.machine import require_package
from jllm.options import Group, command, option

COMMANDS = {
    "control_to_lora": ("jllm.commands.adapter:control_to_lora", "a LoRA adapter near to control adapters, measured"),
    "to_gguf": ("jllm.commands.adapter:to_gguf", "a GGUF file that llama.cpp loads over its file of the model"),
    "info": ("jllm.commands.adapter:info", "norms, effective rank and orthogonality of each module: a table, a page"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterInfoConfig:
    """Options of `adapter info`."""

    folder: Path = option(dataclasses.MISSING, help="peft folder of an adapter", positional=True)
    output: Path | None = option(None, "-o", help="write a page with pictures to this .html file too")
    json: bool = option(False, help="print the figures as JSON")

    def __post_init__(self) -> None:
        _check_adapter_folder(self.folder)
        if self.output is not None and self.output.suffix.lower() != ".html":
            raise UserError(f'--output {self.output}: its name must end in ".html"')


@command(AdapterInfoConfig, name="info")
def info(config: AdapterInfoConfig) -> None:
    """Show what the adapter in FOLDER does to each module: the Frobenius and the spectral norm of the change, its
    effective rank, how parallel the rows of A and the columns of B are (0: orthogonal), and its share of the whole.
    The model is not needed."""
    require_package("torch", "jllm adapter info", "train")
    import json

    from jllm import atomic
    from jllm.models.adapters.analysis import analyse
    from jllm.train.records.adapter_page import adapter_page, as_json, table

    facts = analyse(config.folder)
    if config.output is not None:
        atomic.write_text(config.output, adapter_page(str(config.folder), facts))
    if config.json:
        say(json.dumps(as_json(facts)))
        return
    say(*table(facts), sep="\n")
    if config.output is not None:
        say(f"wrote {config.output}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterToGgufConfig:
    """Options of `adapter to_gguf`."""

    folder: Path = option(dataclasses.MISSING, help="peft folder of an adapter", positional=True)
    model: Path = option(
        dataclasses.MISSING, "-m", help="Hugging Face folder of the adapter's model; only its config.json is read"
    )
    output: Path = option(dataclasses.MISSING, "-o", help="the .gguf file to write")
    dtype: str = option("f32", help="type of the numbers in the file", choices=("f32", "f16"))

    def __post_init__(self) -> None:
        _check_adapter_folder(self.folder)
        if self.output.suffix.lower() != ".gguf":
            raise UserError(f'--output {self.output}: its name must end in ".gguf"')


@command(AdapterToGgufConfig, name="to_gguf")
def to_gguf(config: AdapterToGgufConfig) -> None:
    """Write the LoRA adapter in FOLDER as a GGUF file, for llama.cpp's --lora."""
    require_package("peft", "jllm adapter to_gguf", "adapters")
    require_package("gguf", "jllm adapter to_gguf", "adapters")
    from jllm.models.adapters import gguf_export

    done = gguf_export.to_gguf(config.folder, config.model, config.output, dtype=config.dtype)
    say(f"wrote {config.output}: {done.modules} modules of a {done.architecture} model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlToLoraConfig:
    """Options of `adapter control_to_lora`."""

    folder: Path = option(dataclasses.MISSING, help="folder of control adapters", positional=True)
    model: Path = option(dataclasses.MISSING, "-m", help="Hugging Face folder of their model, in fp32, bf16 or fp16")
    output: Path = option(dataclasses.MISSING, "-o", help="where the peft folder is written")
    control_class: str = option("+1", help="which class the LoRA is to be", choices=("+1", "-1"))

    def __post_init__(self) -> None:
        _check_adapter_folder(self.folder)
        check_new_folder(self.output, "--output")


@command(ControlToLoraConfig, name="control_to_lora")
def control_to_lora(config: ControlToLoraConfig) -> None:
    """Make a LoRA adapter of the control adapters in FOLDER, for one class, and measure on the model how far the two
    are apart. It is the same where attention and the feed-forward network read the same input (Cohere); elsewhere it
    is as near as two ways of making one come."""
    require_package("peft", "jllm adapter control_to_lora", "adapters")
    from jllm.models.adapters import control_to_lora as made

    done = made.control_to_lora(config.folder, config.model, config.output, control_class=int(config.control_class))
    say(
        f"logits differ by {done.error:.3g} (root mean square) from those with the control adapters, which moved them"
        f" by {done.moved:.3g}"
    )
    say(f"wrote {config.output}: LoRA on {' and '.join(done.targets)}")


def _check_adapter_folder(folder: Path) -> None:
    if not (folder / "adapter_config.json").is_file():
        missing = "has no adapter_config.json" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder}: {missing}; give a folder that peft or the trainer wrote")


@click.group(cls=Group, lazy=COMMANDS, help="What an adapter does, and adapters for other programs.")
def main() -> None:
    pass
