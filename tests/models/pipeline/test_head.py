"""The head alone gives the family's own logits, on any run of tokens; what is not shown to do so runs whole."""

import functools
from pathlib import Path

import pytest
import torch

from jllm.models.families import catalogue, has_head_apart
from jllm.models.pipeline.head import CHUNK_ELEMENTS, tokens_of_a_chunk
from jllm.models.pipeline.stage import PipelineStage
from jllm.models.weights.source import causal_class
from tests.models.chain import chained_loss_and_gradients, load_chain, packed_batch
from tests.models.family_check import HeadProbe, head_is_apart, make_folder
from tests.models.tiny import tiny_config

torch.set_num_threads(1)

# A soft cap, a division, two multipliers, a base model inside another one, a bias: all of it lies behind the base.
FAMILIES = ("llama", "gemma2", "granite", "cohere", "opt", "phi")


@pytest.mark.parametrize("family", FAMILIES)
def test_head_alone_is_the_familys_own(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    assert has_head_apart(causal_class(config))
    make_folder(config, tmp_path)
    assert head_is_apart(tmp_path, config)


def test_comparison_sees_a_head_that_is_not_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that mixes tokens, or whose forward does not tell its base model what it was told."""
    from transformers import LlamaForCausalLM, LlamaModel

    config = tiny_config("llama")
    make_folder(config, tmp_path)
    plain_head, plain_base = torch.nn.Linear.forward, LlamaModel.forward

    def mixed(self: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        is_head = self.out_features == config.vocab_size
        return plain_head(self, hidden.cumsum(-2) if is_head else hidden)

    with monkeypatch.context() as changed:
        changed.setattr(torch.nn.Linear, "forward", mixed)
        assert not head_is_apart(tmp_path, config)

    plain_whole = LlamaForCausalLM.forward

    @functools.wraps(plain_whole)
    def whole(self: LlamaForCausalLM, *args: object, **kwargs: object) -> object:
        if kwargs.get("input_ids") is not None:
            kwargs["position_ids"] = None
        return plain_whole(self, *args, **kwargs)  # type: ignore[arg-type]

    @functools.wraps(plain_base)
    def base(self: LlamaModel, *args: object, **kwargs: object) -> object:
        output = plain_base(self, *args, **kwargs)  # type: ignore[arg-type]
        if kwargs.get("position_ids") is None:
            output.last_hidden_state = output.last_hidden_state * 1.5
        return output

    with monkeypatch.context() as changed:
        changed.setattr(LlamaForCausalLM, "forward", whole)
        changed.setattr(LlamaModel, "forward", base)
        assert not head_is_apart(tmp_path, config)
    assert head_is_apart(tmp_path, config)


def test_what_is_not_shown_runs_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tiny_config("llama"), tmp_path)
    widths = {}
    for module in ("transformers.models.llama.modeling_llama", "somewhere.else"):
        probe = Widths()
        stages = load_chain(tmp_path, [0, 4])
        monkeypatch.setattr(type(stages[0].model), "__module__", module)
        chained_loss_and_gradients(
            [PipelineStage(stages[0].model, stages[0].span, probe)], *packed_batch(96, packed=False)
        )
        widths[module] = probe.width
    assert widths == {"transformers.models.llama.modeling_llama": 32, "somewhere.else": 96}


class Widths(HeadProbe):
    """Also keeps the width of what it is given."""

    width = 0

    def __call__(self, hidden: torch.Tensor, *rest: object) -> torch.Tensor:
        self.width = hidden.shape[-1]
        return super().__call__(hidden, *rest)  # type: ignore[arg-type]


def test_families_that_are_apart() -> None:
    """What the walk says: nearly all that pass, and none that does not."""
    families = catalogue()[1]
    apart = [family.model_type for family in families if family.head_apart]
    assert set(apart) <= {family.model_type for family in families if family.status == "pass"}
    assert len(apart) >= 140
    plain = [family.model_type for family in families if family.plain_head]
    assert set(plain) <= set(apart)
    assert len(plain) >= 130


def test_a_chunk_has_at_most_so_many_logits() -> None:
    for vocabulary in (1, 96, 49_152, 128_256, CHUNK_ELEMENTS):
        tokens = tokens_of_a_chunk(vocabulary)
        assert tokens * vocabulary <= CHUNK_ELEMENTS < (tokens + 1) * vocabulary
    assert tokens_of_a_chunk(2 * CHUNK_ELEMENTS) == 1
