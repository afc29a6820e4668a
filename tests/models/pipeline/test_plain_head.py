"""A head that is a product, a factor and a soft cap is found to be one; whatever else it does, it is not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from jllm.models.pipeline.head import PlainHead
from jllm.models.pipeline.plain_head import find_plain_head
from jllm.models.pipeline.structure import whole_structure
from tests.models.tiny import tiny_config

torch.set_num_threads(1)


def model_of(family: str, device: str = "cpu", **more: Any) -> PreTrainedModel:
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(family, **more))
    return model


def found_in(model: PreTrainedModel) -> PlainHead | None:
    base_name, *inside = whole_structure(model).layers.split(".")
    return find_plain_head(model, base_name=base_name, inner_names=tuple(inside[:-1]))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("family", "more", "factor", "cap", "has_bias"),
    [
        ("llama", {}, 1.0, None, False),
        ("gemma2", {"final_logit_softcapping": 30.0}, 1.0, 30.0, False),
        ("gemma2", {"final_logit_softcapping": None}, 1.0, None, False),
        ("cohere", {"logit_scale": 0.07}, 0.07, None, False),
        ("granite", {"logits_scaling": 13.0}, 1 / 13, None, False),
        ("phi", {}, 1.0, None, True),
        ("gpt2", {}, 1.0, None, False),
        ("bert", {}, 1.0, None, True),
        ("opt", {"word_embed_proj_dim": 16}, 1.0, None, False),
        ("xlstm", {}, 1.0, 30.0, False),
    ],
)
def test_forms(
    family: str, more: dict[str, Any], factor: float, cap: float | None, has_bias: bool, device: str
) -> None:
    model = model_of(family, device, **more)
    plain = found_in(model)
    assert plain is not None
    assert plain.linear is model.get_output_embeddings()
    assert plain.factor == pytest.approx(factor, rel=1e-6)
    assert plain.cap == (None if cap is None else pytest.approx(cap, rel=1e-6))
    assert (plain.linear.bias is not None) == has_bias


def hook(model: PreTrainedModel) -> None:
    model.lm_head.register_forward_hook(lambda module, given, output: output * 2)


def subclass(model: PreTrainedModel) -> None:
    model.lm_head.__class__ = type("Other", (nn.Linear,), {})


def parametrise(model: PreTrainedModel) -> None:
    nn.utils.parametrizations.weight_norm(model.lm_head)


def adapter(model: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["lm_head"]), model)


def wrapped_forward(model: PreTrainedModel) -> None:
    model.lm_head.forward = model.lm_head.forward


def changed_logits(change: Callable[[Tensor], Tensor]) -> Callable[[PreTrainedModel], None]:
    def apply(model: PreTrainedModel) -> None:
        plain = type(model).forward

        def forward(self: PreTrainedModel, **keywords: Any) -> Any:
            output = plain(self, **keywords)
            output.logits = change(output.logits)
            return output

        model.__class__ = type("Changed", (type(model),), {"forward": forward})

    return apply


def shifted(logits: Tensor) -> Tensor:
    return logits + 1


CHANGES: dict[str, Callable[[PreTrainedModel], None]] = {
    "hook": hook,
    "subclass": subclass,
    "parametrised": parametrise,
    "adapter": adapter,
    "wrapped": wrapped_forward,
    "shift": changed_logits(shifted),
    "one place scaled": changed_logits(lambda logits: logits * torch.where(torch.arange(96) == 40, 2.0, 1.0)),
    "one place left out": changed_logits(lambda logits: logits.index_fill(-1, torch.tensor([40]), -torch.inf)),
    "cut": changed_logits(lambda logits: logits[..., :90]),
    "another cap": changed_logits(lambda logits: 30 * (logits / 30).clamp(-1, 1)),
    "softsign": changed_logits(lambda logits: 30 * nn.functional.softsign(logits / 30)),
    "tokens mixed": changed_logits(lambda logits: logits.cumsum(1)),
    "negative": changed_logits(lambda logits: -logits),
    "rounded": changed_logits(lambda logits: logits.bfloat16()),
    "normalised": changed_logits(lambda logits: logits.log_softmax(-1)),
    "noise": changed_logits(lambda logits: logits * (1 + 1e-6 * torch.rand_like(logits))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_others_are_not_plain(change: str) -> None:
    model = model_of("llama")
    assert found_in(model) is not None
    CHANGES[change](model)
    assert found_in(model) is None


def test_its_parts_make_the_logits() -> None:
    """On any run of tokens; and nothing of the model is changed by asking."""
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as Output

    from jllm.models.pipeline.head import FamilyHead

    model = model_of("bert")
    before = {name: id(module) for name, module in model.named_modules()}
    plain = found_in(model)
    assert plain is not None
    head = FamilyHead(
        model,
        base_name="bert",
        inner_names=("encoder",),
        returned=Output,
        plain=plain,
    )
    assert {name: id(module) for name, module in model.named_modules()} == before
    for shape in ((2, 5, 32), (7, 32)):
        hidden = torch.randn(*shape)
        assert torch.equal(plain.linear(head.before(hidden)), head(hidden))
