"""Options about the model, in real runs of two stages: they do what they do to one plain model, or change nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.ranks import Ranks
from tests.distributed.runs import records, train_rank
from tests.fixtures import random_rows, tiny_llama, write_rows

LENGTH = 32


def full_rows(count: int, vocab: int = 96) -> list[dict[str, Any]]:
    """Rows of one length, so that no micro-batch has padding."""
    rng = np.random.default_rng(3)
    return [{"input_ids": rng.integers(5, vocab, LENGTH + 1).tolist()} for _ in range(count)]


def options_of(model: Path, data: Path, log: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "train_data": (str(data),),
        "precision": "fp32",
        "pipe_parallel_size": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "seq_len": LENGTH,
        "no_shuf": True,
        "max_steps": 3,
        "lr_scheduler_type": "constant",
        "log_dir": log,
        **more,
    }


def weights_of(folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    weights: dict[str, Any] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return weights


def test_balance_loss_of_a_mixture_of_experts(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """One SGD step with `--router_aux_loss_coef` is one plain step on loss + coefficient x balance loss."""
    import torch
    from transformers import AutoModelForCausalLM

    from jllm.models.router_balance import balance_loss
    from tests.models.family_check import make_folder
    from tests.models.tiny import tiny_config

    config = tiny_config("mixtral")
    make_folder(config, tmp_path / "model")
    rows = full_rows(4)
    data = write_rows(tmp_path / "data", rows)
    trained, logged = {}, {}
    for coefficient in (0.0, 0.5):
        out = tmp_path / f"out-{coefficient}"
        more = {"optimizer": "sgd", "learning_rate": 0.1, "gradient_clipping": 0.0, "max_steps": 1, "output_dir": out}
        options = options_of(tmp_path / "model", data, out / "log", router_aux_loss_coef=coefficient, **more)
        assert ranks(2).run(train_rank, options) == [None] * 2
        [logged[coefficient]] = records(out / "log")
        trained[coefficient] = weights_of(out)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).train()
        total, balance, loads = torch.zeros(()), torch.zeros(()), []
        for ids in (torch.tensor([row["input_ids"] for row in rows[at : at + 2]]) for at in (0, 2)):
            output = plain(input_ids=ids[:, :-1], output_router_logits=True, use_cache=False)
            targets = ids[:, 1:].flatten()
            total = total + torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), targets, reduction="sum")
            layers = [balance_loss(logits, config.num_experts_per_tok) for logits in output.router_logits]
            balance = balance + sum(loss for loss, _ in layers) / len(layers) / 2
            loads.append(torch.stack([counts for _, counts in layers]))
        loss = total / (4 * LENGTH)
        (loss + coefficient * balance).backward()
        assert logged[coefficient]["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert logged[coefficient]["aux_loss"] == pytest.approx(balance.item(), abs=1e-5)
        shares = sum(loads) / sum(loads).sum(1, keepdim=True)
        assert logged[coefficient]["max_expert_load"] == pytest.approx(shares.max().item(), abs=1e-5)
        for name, parameter in plain.named_parameters():
            expected = parameter.detach() - 0.1 * parameter.grad
            torch.testing.assert_close(trained[coefficient][name], expected, atol=1e-6, rtol=0)
    assert logged[0.0]["loss"] == logged[0.5]["loss"]
    gate = next(name for name in trained[0.0] if name.endswith("0.mlp.gate.weight"))
    assert not torch.allclose(trained[0.0][gate], trained[0.5][gate])


def train_in_fp16(options: dict[str, Any]) -> tuple[str | None, list[float]]:
    """A rank's answer, and what its part of the losses was multiplied with in each step, on any CPU."""
    from deepspeed.accelerator import get_accelerator

    from jllm.train.distributed.deepspeed_engine import TrainingEngine

    get_accelerator().is_fp16_supported = lambda: True  # to be slow is not to be unable
    scales = []
    real = TrainingEngine.gradient_scale
    TrainingEngine.gradient_scale = property(lambda engine: scales.append(real.fget(engine)) or scales[-1])
    answer = train_rank(options)
    assert scales[::2] == scales[1::2], "the loss and the balance loss are told one scale each, in every step"
    return answer, scales[::2]


def test_balance_loss_in_fp16(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """It is scaled as the training loss is, also after the loss scale has changed."""
    from tests.models.family_check import make_folder
    from tests.models.tiny import tiny_config

    make_folder(tiny_config("mixtral"), tmp_path / "model")
    data = write_rows(tmp_path / "data", full_rows(12))
    settings = tmp_path / "ds.json"
    settings.write_text('{"fp16": {"initial_scale_power": 6, "loss_scale_window": 1}}')
    trained = {}
    for precision, coefficient in (("fp32", 0.0), ("fp32", 5.0), ("fp16", 5.0)):
        out = tmp_path / f"{precision}-{coefficient}"
        more = {"optimizer": "sgd", "learning_rate": 0.1, "gradient_clipping": 0.0, "output_dir": out}
        more |= {"precision": precision, "router_aux_loss_coef": coefficient}
        more |= {"ds_config": settings} if precision == "fp16" else {}
        answers = ranks(2).run(train_in_fp16, options_of(tmp_path / "model", data, out / "log", **more))
        assert answers == [(None, [32.0, 32.0, 64.0] if precision == "fp16" else [0.5] * 3)] * 2
        trained[precision, coefficient] = weights_of(out)
    without, with_loss, found = (trained[key] for key in (("fp32", 0.0), ("fp32", 5.0), ("fp16", 5.0)))
    for name in (name for name in found if name.endswith("mlp.gate.weight")):
        effect = with_loss[name] - without[name]
        assert effect.norm() > 1e-2, name
        # Not 1: rounding sends some tokens elsewhere, and DeepSpeed divides a step that doubles its scale by the
        # new scale. Without the loss scale it is below 0.1.
        share = ((found[name] - without[name]) * effect).sum() / effect.square().sum()
        assert 0.5 < share < 1.5, (name, share)


def train_and_count(options: dict[str, Any]) -> tuple[str | None, list[tuple[int, int, int]]]:
    """A rank's answer, and (units, recomputed, offloaded bytes) of its activation checkpointing."""
    from jllm.train import setup

    states = []
    real = setup.checkpoint_activations

    def keep(*arguments: Any, **options: Any) -> Any:
        states.append(real(*arguments, **options))
        return states[-1]

    setup.checkpoint_activations = keep
    answer = train_rank(options)
    return answer, [(state.units, state.recomputed, state.offloaded_bytes) for state in states]


def test_activation_checkpointing(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """Two stages of two layers, 3 steps of 2 micro-batches: equal losses, and as many units again as asked for."""
    model = tiny_llama(tmp_path / "model", tied=True)
    data = write_rows(tmp_path / "data", full_rows(12))
    cases: dict[str, tuple[dict[str, Any], list[tuple[int, int]]]] = {
        "off": ({}, []),
        "interval": ({"checkpoint_grad_interval": 2}, [(1, 6)]),
        "attention": ({"checkpoint_grad_attention": True, "checkpoint_grad_offload": True}, [(2, 12)]),
        "until": ({"checkpoint_grad_interval": 1, "no_checkpoint_grad_step": 1}, [(2, 4)]),
    }
    losses = {}
    for name, (more, counts) in cases.items():
        options = options_of(model, data, tmp_path / name, partition_method="uniform", **more)
        for answer, states in ranks(2).run(train_and_count, options):
            assert answer is None
            assert [state[:2] for state in states] == counts, name
            assert all((offloaded > 0) == (name == "attention") for *_, offloaded in states)
        losses[name] = [record["loss"] for record in records(tmp_path / name)]
    assert len(losses["off"]) == 3
    for name in cases:
        assert losses[name] == pytest.approx(losses["off"], abs=1e-6), name


def test_small_updates_are_not_lost_in_bf16(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """Each update is far below half a unit of the weights in the last place; fp32 masters add them up."""
    import torch
    from safetensors.torch import load_file

    model = tiny_llama(tmp_path / "model", tied=False, dtype="bfloat16")
    data = write_rows(tmp_path / "data", full_rows(4))
    more = {"precision": "bf16", "max_steps": 60, "learning_rate": 2e-5, "output_dir": tmp_path / "out"}
    assert ranks(2).run(train_rank, options_of(model, data, tmp_path / "log", steps_per_print=60, **more)) == [None] * 2
    before, after = load_file(model / "model.safetensors"), {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        after |= load_file(path)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.3.self_attn.q_proj.weight"):
        large = before[name].abs() > 0.125
        # A unit in the last place of numbers above 0.125 is 2^-10: fifty times one update.
        assert (before[name].float() - 2e-5).bfloat16()[large].equal(before[name][large])
        assert (after[name] != before[name])[large].any(), name
        assert ((after[name] - before[name]).float().abs() < 60 * 3e-5 + 2**-9)[large].all()
    assert torch.bfloat16 in {tensor.dtype for tensor in after.values()}


def test_model_only_checkpoints_are_the_model_of_their_step(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = tiny_llama(tmp_path / "model", tied=True)
    data = write_rows(tmp_path / "data", full_rows(12))
    more = {"steps_per_checkpoint": 1, "only_ckpt_model": True, "learning_rate": 1e-2}
    more |= {"checkpoint": tmp_path / "ckpt", "output_dir": tmp_path / "out"}
    assert ranks(2).run(train_rank, options_of(model, data, tmp_path / "log", **more)) == [None] * 2
    ids = torch.arange(24)[None]
    last, third, second = (
        AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        for folder in (tmp_path / "out", tmp_path / "ckpt/step-00000003", tmp_path / "ckpt/step-00000002")
    )
    assert torch.equal(last, third)
    assert not torch.equal(last, second)


def test_an_older_checkpoint_trains_as_it_is(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """Qwen-1 in its published layout goes in, a folder that plain transformers loads comes out, with equal logits."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.models.legacy.published import VOCAB, publish, qwen

    weights = publish("qwen", tmp_path / "model")
    data = write_rows(tmp_path / "data", full_rows(4, VOCAB))
    more = {"max_steps": 1, "learning_rate": 0.0, "output_dir": tmp_path / "out"}
    options = options_of(tmp_path / "model", data, tmp_path / "log", partition_method="0,1,3", **more)
    assert ranks(2).run(train_rank, options) == [None] * 2
    ids = torch.tensor(full_rows(4, VOCAB)[0]["input_ids"])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(plain(ids[None]).logits[0], qwen(weights, ids), atol=2e-5, rtol=1e-4)
    [record] = records(tmp_path / "log")
    targets = [torch.tensor(row["input_ids"]) for row in full_rows(4, VOCAB)]
    losses = [torch.nn.functional.cross_entropy(qwen(weights, row)[:-1], row[1:]) for row in targets]
    assert record["loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


def test_random_weights_do_not_depend_on_the_stages(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """`--init` on a folder without weights: the same ones for one and two stages, others for another seed."""
    import torch

    whole = tiny_llama(tmp_path / "whole", tied=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_bytes((whole / "config.json").read_bytes())
    data = write_rows(tmp_path / "data", full_rows(4))
    found = []
    for stages, seed in ((1, 5), (2, 5), (2, 6)):
        out = tmp_path / f"out-{stages}-{seed}"
        more = {"init": True, "seed": seed, "pipe_parallel_size": stages, "learning_rate": 0.0, "output_dir": out}
        options = options_of(tmp_path / "model", data, out / "log", max_steps=1, **more)
        assert ranks(stages).run(train_rank, options) == [None] * stages
        found.append((records(out / "log")[0]["loss"], weights_of(out)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    for name, tensor in found[0][1].items():
        assert torch.equal(tensor, found[1][1][name]), name
    name = "model.layers.3.mlp.up_proj.weight"
    assert not torch.equal(found[0][1][name], found[2][1][name])
    assert found[0][1][name].std().item() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_frozen_tied_embedding_stays(ranks: Callable[[int], Ranks], tmp_path: Path, precision: str) -> None:
    """It is a parameter of both stages, and only the layers and the norm train."""
    model = tiny_llama(tmp_path / "model", tied=True, dtype="float32" if precision == "fp32" else "bfloat16")
    data = write_rows(tmp_path / "data", full_rows(12))
    more = {"frozen_modules": "embed_tokens", "learning_rate": 1e-2, "precision": precision}
    options = options_of(model, data, tmp_path / "log", output_dir=tmp_path / "out", **more)
    assert ranks(2).run(train_rank, options) == [None] * 2
    before, after = weights_of(model), weights_of(tmp_path / "out")
    same = {name for name in before if (before[name] == after[name]).all()}
    assert same == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_block_mask_is_refused_where_documents_would_mix(
    ranks: Callable[[int], Ranks], tmp_path: Path, family: str
) -> None:
    from tests.models.family_check import make_folder
    from tests.models.tiny import tiny_config

    make_folder(tiny_config(family), tmp_path / "model")
    data = write_rows(tmp_path / "data", random_rows(4, packed=True))
    options = options_of(tmp_path / "model", data, tmp_path / "log", block_mask=True, seq_len=None)
    answers = ranks(2).run(train_rank, options)
    assert all(answer is not None and answer.startswith("--block_mask: model type") for answer in answers)
