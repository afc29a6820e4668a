"""A GGUF file → a plain Hugging Face folder: safetensors, tokenizer, chat template, generation config.

    python tools/gguf2hf.py --input SmolLM2-135M-Instruct.Q4_1.gguf --output model

transformers reads and de-quantizes the GGUF; the weights then move to a model whose config no longer says
"quantized", because `save_pretrained` refuses such a config, and are saved in `--dtype`. A GGUF names its pre-tokenizer
instead of describing it, and transformers takes every BPE one for GPT-2's; the named one is put in its place here,
and a name this file does not know is refused rather than guessed: ids that are nearly right train a worse model.

Guarantees: the folder appears at the end, complete, or not at all. Cost: the whole model in memory in fp32, twice, and
some ten seconds for a vocabulary of 49,152 (the GGUF reader is slow on lists of strings).
"""

import functools
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from jllm import atomic
from jllm.errors import UserError, say
from jllm.options import command, option

MODEL_AND_PRE = ("tokenizer.ggml.model", "tokenizer.ggml.pre")
PRE_TOKENIZERS = ("gpt-2", "smollm")


@dataclass(frozen=True, kw_only=True)
class Gguf2HfConfig:
    input: Path = option(MISSING, "-i", help="the .gguf file", metavar="FILE")
    output: Path = option(MISSING, "-o", help="the Hugging Face folder to make; it must not exist", metavar="FOLDER")
    dtype: str = option("bfloat16", help="dtype of the saved weights", choices=("bfloat16", "float16", "float32"))

    def __post_init__(self) -> None:
        if not self.input.is_file():
            raise UserError(f"--input {self.input}: no such file; give a .gguf file")
        if self.output.exists():
            raise UserError(f"--output {self.output}: exists already; remove it or name another folder")


@command(Gguf2HfConfig, name="gguf2hf")
def main(config: Gguf2HfConfig) -> None:
    """Turn a GGUF file into a plain Hugging Face folder."""
    temporary = config.output.with_name(f".{config.output.name}.tmp")
    atomic.remove_tree(temporary, missing_ok=True)
    from jllm.data.tokenizer.facts import without_notices

    with without_notices():
        parameters = convert(config.input, temporary, config.dtype)
    temporary.rename(config.output)
    say(f"{config.output}: {parameters / 1e6:.1f} M parameters, {config.dtype}, from {config.input.name}")


def convert(source: Path, folder: Path, dtype: str) -> int:
    """Write the Hugging Face folder of a GGUF file; gives the number of parameters."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from jllm.models.remote_code import check_no_remote_code

    # transformers reads the file's lists for tokenizer, configuration and weights alike, seconds each, and makes the
    # table of tensor names anew for every module.
    for slow in ("GGUFReader", "get_tensor_name_map"):
        setattr(gguf, slow, functools.cache(getattr(gguf, slow)))
    logging.disable_progress_bar()  # a bar for each of four phases of a few seconds hides the one line that matters
    pre_tokenizer = read_pre_tokenizer(source)
    # Beside the file may lie anything, and transformers reads what it knows the names of.
    check_no_remote_code(source.parent)
    origin: dict[str, Any] = {"gguf_file": source.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **origin)
    set_pre_tokenizer(tokenizer.backend_tokenizer, pre_tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, **origin, dtype=torch.float32)

    config = loaded.config
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    config.dtype = dtype
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.to(getattr(torch, dtype))

    tokenizer.model_max_length = config.max_position_embeddings
    for name in ("is_local", "local_files_only"):  # facts of this reading, not of the tokenizer
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return model.num_parameters()


def read_pre_tokenizer(source: Path) -> str:
    """The name of the pre-tokenizer that a GGUF file asks for.

    Raises:
        UserError: the file is no GGUF, or asks for one that is not known here.
    """
    import gguf

    try:
        fields = gguf.GGUFReader(str(source)).fields
    except ValueError as error:
        raise UserError(f"--input {source}: not a readable GGUF file ({error})") from None
    model, name = (fields[key].contents() if key in fields else None for key in MODEL_AND_PRE)
    if model != "gpt2":
        raise UserError(f'--input {source}: its tokenizer is of type "{model}"; only byte-level BPE ("gpt2") is read')
    if name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UserError(f'--input {source}: its pre-tokenizer is "{name}"; known here: {known}')
    return str(name)


def set_pre_tokenizer(backend: Any, name: str) -> None:
    """Make a byte-level BPE tokenizer split text as `name` says, before merges apply."""
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":  # each digit is a token, whatever stands before it
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    else:
        backend.pre_tokenizer = byte_level


if __name__ == "__main__":
    main()
