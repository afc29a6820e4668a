"""Ask a Hugging Face folder something, by plain transformers.

    python tools/ask.py --model demo-run/output --prompt "What does the with statement do?"

The prompt goes through the folder's chat template where it has one. Each token is the most likely one, so the same
folder gives the same answer. Cost: the model in memory in fp32; about ten seconds for a 135M model on two cores.
"""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from jllm.errors import UserError, say
from jllm.options import command, option


@dataclass(frozen=True, kw_only=True)
class AskConfig:
    prompt: str = option(MISSING, "-p", help="what to ask")
    model: Path = option(MISSING, help="Hugging Face folder", metavar="FOLDER")
    max_new_tokens: int = option(48, help="the answer's greatest length")

    def __post_init__(self) -> None:
        if not (self.model / "config.json").is_file():
            raise UserError(f"--model {self.model}: no config.json in it; give a Hugging Face folder")


@command(AskConfig, name="ask")
def main(config: AskConfig) -> None:
    """Ask a Hugging Face folder something."""
    from transformers.utils import logging

    from jllm.data.tokenizer.facts import without_notices

    logging.disable_progress_bar()
    with without_notices():
        say(f"> {config.prompt}\n{answer(config)}")


def answer(config: AskConfig) -> str:
    """What the model writes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from jllm.models.remote_code import check_no_remote_code
    from jllm.models.weights.source import weight_files

    check_no_remote_code(config.model)
    weight_files(config.model, advice="download them")  # whose index names files of the folder alone
    tokenizer: Any = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32, trust_remote_code=False).eval()
    if tokenizer.chat_template:
        given = tokenizer.apply_chat_template(
            [{"role": "user", "content": config.prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        given = tokenizer(config.prompt, return_tensors="pt")
    with torch.inference_mode():
        written = model.generate(**given, max_new_tokens=config.max_new_tokens, do_sample=False)
    text: str = tokenizer.decode(written[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


if __name__ == "__main__":
    main()
