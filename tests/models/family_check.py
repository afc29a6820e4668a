"""One family, tiny and random: whole against stages, then saved by its stages and loaded by plain transformers.

And whether kernels that know documents by their lengths, and build no mask, compute what the default one does.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv

from jllm.errors import UserError
from jllm.models.attention import VARLEN, packing, varlen_attention
from jllm.models.pipeline.head import Head
from jllm.models.pipeline.stage import PipelineStage
from jllm.models.pipeline.structure import count_layers
from jllm.models.weights.saving import save_stage, write_companions, write_index
from jllm.train.objectives.cross_entropy import CrossEntropy
from jllm.train.objectives.objective import ObjectiveInUse
from tests.models.chain import (
    chained_loss_and_gradients,
    load_chain,
    packed_batch,
    token_loss,
    whole_loss_and_gradients,
    worst_gradient,
)
from tests.models.tiny import tiny_config

LIMIT = 1e-5
# Of gradients between two kernels, which round differently; what is wrong is above 0.1.
KERNEL_LIMIT = 1e-4
# Of a model whose export is compared in bf16 too: some have parts beside the decoder that are never small.
MOST_PARAMETERS = 20_000_000
# Weights of layers that ask for fp32 themselves, which only a model in another dtype shows.
OF_FP32_LAYERS = ("mlp.gate.wg.weight", "feed_forward.expert_bias", "linear_attn.A_log")
# What a mask may hold beside causality and documents, switched on and narrower than a row of `packed_batch`, where the
# family's configuration has it: tiny models must not look right because nothing of it is reached.
NARROW: dict[str, Any] = {
    "sliding_window": 8,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "local_attention": 16,
    "window_size": 8,
    "attention_chunk_size": 8,
    "index_topk": 4,
}


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
    difference = Difference(logits=(before - after).abs().max().item(), where="logits of the exported folder")
    is_small = sum(weight.numel() for weight in whole.parameters()) <= MOST_PARAMETERS
    return compare_half(stages, source, target.with_name("half")) if difference.is_equal and is_small else difference


def compare_half(stages: list[PipelineStage], source: Path, folder: Path) -> Difference:
    """Names, dtypes and bytes of what the stages save in bf16, against what transformers saves in bf16: all the same,
    also what the family keeps in fp32. By the family's own word, and by that of the files."""
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder / "plain")
    plain = _saved(folder / "plain")
    for origin in (None, folder / "plain"):
        target = folder / ("ours" if origin is None else "as published")
        for stage in stages:
            save_stage(stage.model, stage.span, target, dtype=torch.bfloat16, source=origin)
        ours = _saved(target)
        for name in sorted({*plain, *ours}):
            if origin is None and name.endswith(OF_FP32_LAYERS):
                continue
            if name not in ours or name not in plain or ours[name].dtype != plain[name].dtype:
                which = [str(saved[name].dtype) if name in saved else "absent" for saved in (plain, ours)]
                return Difference(logits=float("inf"), where=f"{name} in the export: {which[1]}, not {which[0]}")
            if not torch.equal(ours[name], plain[name]):
                return Difference(logits=float("inf"), where=f"bytes of {name} in the export")
    return Difference()


def _saved(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@dataclass(kw_only=True)
class HeadProbe:
    """An objective that keeps the logits, and what the head makes of runs of the tokens, one token and all of them."""

    logits: Tensor | None = None
    off: float = 0.0
    """The largest difference between a token's logits in a run and among all, as in `worst_gradient`."""

    def __call__(self, hidden: Tensor, head: Head, fields: Mapping[str, Tensor]) -> Tensor:
        logits = head(hidden)
        self.logits = logits.detach()
        with torch.no_grad():
            flat, expected = hidden.flatten(0, -2), self.logits.flatten(0, -2)
            runs = [(head(flat[run]), expected[run]) for run in (slice(3, 10), slice(7, 8), slice(None))]
            runs.append((head(hidden[:, 3:10]), self.logits[:, 3:10]))
            for found, among_all in runs:
                scale = max(1.0, among_all.abs().max().item())
                self.off = max(self.off, (found - among_all).abs().max().item() / scale)
        return token_loss(logits, fields["labels"])


def head_is_apart(folder: Path, config: PretrainedConfig) -> bool:
    """Whether the head works apart from the rest of the model, on one stage and on the last of two.

    Then logits, loss and every gradient are those of the family's whole forward, bit for bit, and logits of a run of
    tokens are those among all tokens.
    """
    layers = count_layers(config)
    vocab = config.get_text_config(decoder=True).vocab_size
    for boundaries in ([0, layers], boundaries_of(config, 2)):
        found = []
        for is_apart in (False, True):
            probe = HeadProbe()
            stages = load_chain(folder, boundaries, objective=probe, head_apart=is_apart)
            torch.manual_seed(0)
            try:
                loss, gradients = chained_loss_and_gradients(stages, *packed_batch(vocab, packed=False))
            except Exception:  # whatever it is, such a run would end in a traceback
                return False
            assert probe.logits is not None
            found.append({"logits": probe.logits, "loss": loss, **gradients})
        whole, apart = found
        if whole.keys() != apart.keys() or not all(torch.equal(whole[name], apart[name]) for name in whole):
            return False
        if probe.off > LIMIT:
            return False
    return True


def head_is_plain(folder: Path, config: PretrainedConfig) -> bool:
    """Whether the head is found to be plain, and a loss fused with it has the loss and every gradient of the one that
    is not, on one stage and on the last of two."""
    layers = count_layers(config)
    vocab = config.get_text_config(decoder=True).vocab_size
    for boundaries in ([0, layers], boundaries_of(config, 2)):
        found = []
        for is_fused in (False, True):
            objective = ObjectiveInUse(CrossEntropy(is_fused=is_fused))
            stages = load_chain(folder, boundaries, objective=objective, head_apart=True)
            if stages[-1].plain_head is None:
                return False
            torch.manual_seed(0)
            found.append(chained_loss_and_gradients(stages, *packed_batch(vocab, packed=False)))
        (loss, gradients), (fused, differing) = found
        if (fused - loss).abs() > LIMIT * loss.abs() or worst_gradient(gradients, differing)[0] > LIMIT:
            return False
    return True


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


def narrow_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """A tiny configuration with all of `NARROW` that the family has, and windows in every second layer at least."""
    plain = tiny_config(model_type, **overrides)
    wanted = {name: value for name, value in NARROW.items() if hasattr(plain, name)} | overrides
    config = tiny_config(model_type, **wanted)
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds == {"full_attention"} and getattr(config, "sliding_window", None):
        config = tiny_config(model_type, **wanted, layer_types=["full_attention", "sliding_attention"] * 2)
    return config


@dataclass(kw_only=True)
class Probe:
    """Stands in for `varlen_attention`, or for flash-attn where a layer asks for what only that has."""

    calls: int = 0
    beyond_varlen: bool = False

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        self.calls += 1
        if options.get("softcap") is None and options.get("s_aux") is None:
            return varlen_attention(module, query, key, value, attention_mask, **options)
        self.beyond_varlen = True
        return flash_reference(query, key, value, **options), None


def flash_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **unused: Any,
) -> Tensor:
    """What flash-attn makes of the arguments that transformers hands it; it sees no mask."""
    batch, heads, length, size = query.shape
    key, value = (repeat_kv(tensor, heads // key.shape[1]) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else size**-0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    bounds = torch.arange(0, (batch + 1) * length, length) if cu_seq_lens_q is None else cu_seq_lens_q
    documents = torch.bucketize(torch.arange(batch * length), bounds, right=True).view(batch, 1, length)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (documents.transpose(1, 2) == documents) & (distance >= 0)
    if sliding_window is not None:
        seen = seen & (distance < sliding_window)
    scores = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, heads, 1, 1).expand(batch, heads, length, 1)], dim=-1)
    return (scores.softmax(dim=-1)[..., :length] @ value).transpose(1, 2).contiguous()


@contextmanager
def probing() -> Iterator[Probe]:
    """`VARLEN` is a probe for a while."""
    probe = Probe()
    AttentionInterface.register(VARLEN, probe)
    try:
        yield probe
    finally:
        AttentionInterface.register(VARLEN, varlen_attention)


def kernels_by_lengths(model_type: str, **overrides: Any) -> str:
    """Which kernels without a mask have the default kernel's loss and gradients, on plain and on packed rows.

    `varlen` and flash-attn ("varlen"), flash-attn only, where the family asks for soft caps or sinks, or can be
    configured to attend in both directions ("flash"), or neither ("none"): documents or windows are in the mask alone,
    the family has an attention of its own, or fails.
    """
    try:
        config = narrow_config(model_type, **overrides)
        default, by_lengths = (_random_model(config, name) for name in (None, VARLEN))
        if not default._supports_flash_attn or not takes_packed_rows(default):
            return "none"
        by_lengths.load_state_dict(default.state_dict())
        vocab = config.get_text_config(decoder=True).vocab_size
        with probing() as probe:
            for packed in (False, True):
                loss, gradients = whole_loss_and_gradients(default, *packed_batch(vocab, packed=packed))
                found, differing = whole_loss_and_gradients(by_lengths, *packed_batch(vocab, packed=packed))
                if (found - loss).abs() > LIMIT or worst_gradient(gradients, differing)[0] > KERNEL_LIMIT:
                    return "none"
                if not probe.calls:  # an attention of its own, or none
                    return "none"
    except Exception:  # whatever it is, such a run would end in a traceback
        return "none"
    both_directions = hasattr(config.get_text_config(decoder=True), "use_bidirectional_attention")
    return "flash" if probe.beyond_varlen or both_directions else "varlen"


def _random_model(config: PretrainedConfig, implementation: str | None) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float32, attn_implementation=implementation
    )
    model.train()
    return model
