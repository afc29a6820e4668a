"""The balance loss: its gradient is that of the training loss plus coefficient times loss, whole or in stages."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from jllm.errors import UserError
from jllm.models.activation_checkpointing import checkpoint_activations
from jllm.models.router_balance import attach_router_balance, balance_loss, experts_per_token
from tests.models.chain import chained_loss_and_gradients, load_chain, packed_batch, token_loss
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config

torch.set_num_threads(1)
COEFFICIENT = 0.3


@pytest.mark.parametrize("is_recomputed", [False, True], ids=["plain", "recomputed"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "qwen4_exp_text"])
def test_gradient_of_the_balance_loss(family: str, is_recomputed: bool, tmp_path: Path) -> None:
    config = tiny_config(family)
    make_folder(config, tmp_path)
    ids, integers = packed_batch(config.vocab_size, packed=False)

    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    output = whole(input_ids=ids, output_router_logits=True, use_cache=False)
    chosen = experts_per_token(config)
    parts = [balance_loss(logits, chosen)[0] for logits in output.router_logits]
    balance = sum(parts) / len(parts)
    (token_loss(output.logits, integers[0]) + COEFFICIENT * balance).backward()

    stages = load_chain(tmp_path, [0, 2, 4])
    if is_recomputed:
        for stage in stages:
            checkpoint_activations(stage.model, stage.span)
    watchers = [attach_router_balance(stage.model, stage.span, COEFFICIENT) for stage in stages]
    _, gradients = chained_loss_and_gradients(stages, ids, integers)
    for name, parameter in whole.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)
    reports = [watcher.take() for watcher in watchers]
    assert sum(report.loss for report in reports) == pytest.approx(balance.item(), rel=1e-5)
    loads = {name: load for report in reports for name, load in report.load.items()}
    assert len(loads) == len(parts)
    assert all(sum(load) == pytest.approx(1) and len(load) == 4 for load in loads.values())


def test_one_layer_equals_transformers() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(50, 8)
    assert balance_loss(logits, 2)[0] == pytest.approx(load_balancing_loss_func((logits,), 8, 2).item(), rel=1e-5)


def test_the_coefficient_changes_the_gradient_only(tmp_path: Path) -> None:
    config = tiny_config("mixtral")
    make_folder(config, tmp_path)
    ids, integers = packed_batch(config.vocab_size)
    found = []
    for coefficient in (0.0, 1.0):
        stages = load_chain(tmp_path, [0, 4])
        attach_router_balance(stages[0].model, stages[0].span, coefficient)
        found.append(chained_loss_and_gradients(stages, ids, integers))
    gate = "model.layers.0.mlp.gate.weight"
    assert found[0][0] == found[1][0]
    assert not torch.allclose(found[0][1][gate], found[1][1][gate])


def test_an_evaluation_is_not_reported(tmp_path: Path) -> None:
    config = tiny_config("mixtral")
    make_folder(config, tmp_path)
    stage = load_chain(tmp_path, [0, 4])[0]
    watcher = attach_router_balance(stage.model, stage.span, COEFFICIENT)
    with torch.no_grad():
        stage.eval()(packed_batch(config.vocab_size))
    assert watcher.take().load == {}
    stage.train()(packed_batch(config.vocab_size))
    assert len(watcher.take().load) == 4


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "minimax_m2", "ernie4_5_moe", "lfm2_moe", "nemotron_h"])
def test_load_is_of_the_experts_that_a_bias_chose(family: str, tmp_path: Path) -> None:
    """The bias sends every token to the last two experts, whatever its logits are."""
    config = tiny_config(family)
    make_folder(config, tmp_path)
    stage = load_chain(tmp_path, [0, 4])[0]
    for name, tensor in stage.model.named_buffers():
        if "bias" in name and tensor.shape[-1] == 4:
            tensor.copy_(torch.linspace(-5, 5, 4).expand_as(tensor))
    for name, tensor in stage.model.named_parameters():
        if "correction_bias" in name:
            tensor.data.copy_(torch.linspace(-5, 5, 4).expand_as(tensor))
    watcher = attach_router_balance(stage.model, stage.span, COEFFICIENT)
    stage(packed_batch(config.vocab_size, packed=False))
    load = watcher.take().load
    assert load
    assert all(shares == [0.0, 0.0, 0.5, 0.5] for shares in load.values()), load


def test_each_router_is_watched_once(tmp_path: Path) -> None:
    """JetMoe has two of them a layer, one in its attention, whose logits two modules hand on."""
    make_folder(tiny_config("jetmoe"), tmp_path)
    stage = load_chain(tmp_path, [0, 4])[0]
    watcher = attach_router_balance(stage.model, stage.span, COEFFICIENT)
    stage(packed_batch(96, packed=False))
    kinds = ("mlp.router", "self_attention.experts.router")
    assert sorted(watcher.take().load) == sorted(f"model.layers.{index}.{kind}" for index in range(4) for kind in kinds)


def test_routers_that_the_decoder_inside_declares(tmp_path: Path) -> None:
    """Llama 4's decoder says which its routers are, the model around it does not; sigmoid of one expert a token."""
    make_folder(tiny_config("llama4_text"), tmp_path)
    stage = load_chain(tmp_path, [0, 4])[0]
    watcher = attach_router_balance(stage.model, stage.span, COEFFICIENT)
    stage(packed_batch(96, packed=False))
    load = watcher.take().load
    assert sorted(load) == [f"model.layers.{index}.feed_forward.router" for index in range(4)]
    assert all(len(shares) == 4 and sum(shares) == pytest.approx(1) for shares in load.values())


def test_a_configuration_that_asks_for_transformers_balance_loss(tmp_path: Path) -> None:
    """The last stage has no routed layer, of which transformers' own function would make an IndexError."""
    config = tiny_config("qwen2_moe", mlp_only_layers=[3], output_router_logits=True)
    make_folder(config, tmp_path)
    batch = packed_batch(config.vocab_size, packed=False)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    expected = token_loss(whole(input_ids=batch[0]).logits, batch[1][0])
    stages = load_chain(tmp_path, [0, 3, 4])
    torch.testing.assert_close(chained_loss_and_gradients(stages, *batch)[0], expected.detach(), atol=1e-5, rtol=0)
    assert stages[-1].model.config.output_router_logits  # what is exported says what was given


def test_dense_models_are_refused(tmp_path: Path) -> None:
    make_folder(tiny_config("llama"), tmp_path)
    stage = load_chain(tmp_path, [0, 4])[0]
    with pytest.raises(UserError, match="no routers"):
        attach_router_balance(stage.model, stage.span, 0.1)
