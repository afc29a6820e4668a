"""One family, tiny and random: whole against stages, then saved by its stages and loaded by plain transformers."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.configuration_utils import PretrainedConfig

from jllm.models.anatomy import count_layers
from jllm.models.attention import packing
from jllm.models.stage import spans_of
from jllm.models.weights import load_stage, save_stage, write_companions, write_index
from tests.models.chain import packed_batch, worst_difference

LIMIT = 1e-5


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The worst differences found; `where` names the gradient."""

    loss: float = 0.0
    gradient: float = 0.0
    logits: float = 0.0
    where: str = ""

    @property
    def is_equal(self) -> bool:
        return self.loss <= LIMIT and self.gradient <= LIMIT and self.logits == 0.0


def make_folder(config: PretrainedConfig, folder: Path) -> None:
    """A random model, as transformers saves it."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def unreadable(folder: Path) -> str | None:
    """Why plain transformers cannot load what it saved itself, in which case no comparison is possible."""
    try:
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except RuntimeError as error:
        return f"plain transformers cannot load what it saves of it ({str(error).splitlines()[0][:60]}...)"
    return None


def boundaries_of(config: PretrainedConfig, stages: int) -> list[int]:
    """Uneven ones: [0, 1, 3, 4] for three stages of four layers."""
    layers = count_layers(config)
    return [0, layers // 2, layers] if stages == 2 else [0, 1, layers - 1, layers]


def compare_stages(config: PretrainedConfig, folder: Path, *, stages: int, packed: bool) -> Difference:
    """Loss and gradients of the chained stages against the whole model's."""
    text = config.get_text_config(decoder=True)
    loss, gradient, where = worst_difference(
        folder, boundaries_of(config, stages), packed=packed, vocab=text.vocab_size
    )
    return Difference(loss=loss, gradient=gradient, where=where)


def compare_export(config: PretrainedConfig, folder: Path, target: Path, *, stages: int) -> Difference:
    """Logits of what the stages save against those of what they were loaded from, both by plain transformers."""
    for span in spans_of(boundaries_of(config, stages)):
        model = load_stage(folder, span, dtype=torch.float32)
        save_stage(model, span, target, dtype=torch.float32)
    write_companions(model, target, dtype=torch.float32, source=folder)
    write_index(target)
    ids, _ = packed_batch(config.get_text_config(decoder=True).vocab_size)
    logits = []
    for source in (folder, target):
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(plain(input_ids=ids).logits)
    return Difference(logits=(logits[0] - logits[1]).abs().max().item(), where="logits of the exported folder")


def isolates_documents(config: PretrainedConfig, folder: Path) -> bool:
    """Whether a document's logits in a packed row are those that it has alone."""
    ids, integers = packed_batch(config.get_text_config(decoder=True).vocab_size)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    try:
        with torch.no_grad():
            apart = packing(plain, integers[1])
            packed = plain(input_ids=ids, position_ids=integers[1], use_cache=False, **apart).logits[:1, 5:14]
            alone = plain(input_ids=ids[:1, 5:14], position_ids=torch.arange(9)[None], use_cache=False).logits
    except TypeError:  # takes no position ids
        return False
    return bool((packed - alone).abs().max() < 1e-4)
