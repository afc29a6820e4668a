"""One family, tiny and random: whole against stages, then saved by its stages and loaded by plain transformers."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig

from jllm.errors import UserError
from jllm.models.anatomy import count_layers
from jllm.models.attention import packing
from jllm.models.stage import PipelineStage
from jllm.models.weights import save_stage, write_companions, write_index
from tests.models.chain import (
    chained_loss_and_gradients,
    load_chain,
    packed_batch,
    whole_loss_and_gradients,
    worst_gradient,
)

LIMIT = 1e-5


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The differences of one comparison; `where` names it, and the gradient that differs most."""

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


def load_whole(folder: Path) -> PreTrainedModel:
    """The model as plain transformers loads it, in training mode."""
    whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole.train()
    return whole


def boundaries_of(config: PretrainedConfig, stages: int) -> list[int]:
    """Uneven ones: [0, 1, 3, 4] for three stages of four layers."""
    layers = count_layers(config)
    return [0, layers // 2, layers] if stages == 2 else [0, 1, layers - 1, layers]


def takes_packed_rows(whole: PreTrainedModel) -> bool:
    """Whether rows of several documents are possible at all; such a family is refused with `--block_mask`."""
    try:
        packing(whole, packed_batch(8)[1][1])
    except UserError:
        return False
    return True


def compare_family(whole: PreTrainedModel, folder: Path, target: Path) -> Difference:
    """Two and three chained stages against the whole model, plain and packed rows, then what three stages save.

    `folder` holds `whole`; `target` is written. Returns the first comparison that is not equal, or the last one.
    """
    config = whole.config
    vocab = config.get_text_config(decoder=True).vocab_size
    ways = (False, True) if takes_packed_rows(whole) else (False,)
    expected = {}
    for packed in ways:
        torch.manual_seed(0)
        expected[packed] = whole_loss_and_gradients(whole, *packed_batch(vocab, packed=packed))
    for count in (2, 3):
        stages = load_chain(folder, boundaries_of(config, count))
        for packed in ways:
            torch.manual_seed(0)
            loss, gradients = chained_loss_and_gradients(stages, *packed_batch(vocab, packed=packed))
            worst, name = worst_gradient(expected[packed][1], gradients)
            difference = Difference(
                loss=(loss - expected[packed][0]).abs().item(),
                gradient=worst,
                where=f"{count} stages, {'packed' if packed else 'plain'} rows, {name}",
            )
            if not difference.is_equal:
                return difference
    return compare_export(whole, stages, folder, target)


def compare_export(whole: PreTrainedModel, stages: list[PipelineStage], source: Path, target: Path) -> Difference:
    """Logits of what the stages save against those of what they were loaded from, both by plain transformers."""
    for stage in stages:
        save_stage(stage.model, stage.span, target, dtype=torch.float32)
    write_companions(stages[-1].model, target, dtype=torch.float32, source=source)
    write_index(target)
    ids, _ = packed_batch(whole.config.get_text_config(decoder=True).vocab_size)
    with torch.no_grad():
        before, after = (plain.eval()(input_ids=ids).logits for plain in (whole, load_whole(target)))
    return Difference(logits=(before - after).abs().max().item(), where="logits of the exported folder")


def isolates_documents(whole: PreTrainedModel) -> bool:
    """Whether a document's logits in a packed row are those that it has alone, and not where positions go on."""
    if not takes_packed_rows(whole):
        return False
    ids, integers = packed_batch(whole.config.get_text_config(decoder=True).vocab_size)
    whole.eval()
    with torch.no_grad():
        try:
            apart = packing(whole, integers[1])
            packed = whole(input_ids=ids, position_ids=integers[1], use_cache=False, **apart).logits[:1, 5:14]
            alone = whole(input_ids=ids[:1, 5:14], position_ids=torch.arange(9)[None], use_cache=False).logits
        except TypeError:  # takes no position ids
            return False
        together = whole(input_ids=ids, use_cache=False).logits[:1, 5:14]
    assert (together - alone).abs().max() > 1e-3, "the documents say nothing about each other in this model"
    return bool((packed - alone).abs().max() < 1e-4)
