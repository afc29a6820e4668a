"""A frozen model in few bits: what is refused, each in one line, and how a folder that is quantised is taken."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")

from jllm.errors import UserError
from jllm.models.weights.quantisation import Quantisation, QuantisationPlan, plan_quantisation
from jllm.models.weights.source import causal_class
from jllm.train.adapters import Adapters, find_adapters
from jllm.train.config import TrainConfig
from jllm.train.quantisation import chosen_quantisation, described, find_quantisation, quantisation_record
from tests.models.tiny import tiny_config

FOUR = {"lora_dim": 4, "load_in_4bit": True}


def config(**more: Any) -> TrainConfig:
    return TrainConfig(**{"model": Path("model"), "train_data": ("data",), **more})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"load_in_4bit": True}, "--load_in_4bit: a quantised model is not trained itself, adapters beside it are"),
        ({"load_in_8bit": True}, "--load_in_8bit: a quantised model is not trained itself, adapters beside it are"),
        (FOUR | {"load_in_8bit": True}, "--load_in_4bit and --load_in_8bit exclude each other; give one of them"),
        ({"lora_dim": 4, "bnb_4bit_quant_type": "fp4"}, "--bnb_4bit_quant_type fp4 is an option of --load_in_4bit"),
        ({"bnb_4bit_use_double_quant": False}, "--no_bnb_4bit_use_double_quant is an option of --load_in_4bit"),
        (
            {"lora_dim": 4, "load_in_8bit": True, "bnb_4bit_quant_type": "fp4"},
            "--bnb_4bit_quant_type fp4 is an option of --load_in_4bit",
        ),
        ({"lora_dim": 4, "skip_quant": "q_proj"}, "--skip_quant 'q_proj' says what --load_in_4bit or --load_in_8bit"),
        (FOUR | {"init": True}, "--load_in_4bit quantises the weights of --model, and --init has none; drop one"),
        (FOUR | {"target_modules": "q_proj"}, "--target_modules chooses among the model's own parameters"),
    ],
)
def test_what_does_not_go_together(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        config(**more)
    assert str(refused.value).startswith(message)


def test_the_weights_of_the_model_are_read_beside_adapters_of_a_checkpoint() -> None:
    assert config(**FOUR, from_ckpt=Path("c")).reads_weights
    assert not config(from_ckpt=Path("c")).reads_weights
    assert not config(lora_dim=4, init=True).reads_weights


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """What says of itself that it is in NF4, with scales that are quantised too."""
    said = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    fields = tiny_config("llama").to_dict() | {"quantization_config": said | {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


def test_a_quantised_folder_is_taken_as_it_is(stored: Path) -> None:
    expected = Quantisation(bits=4, is_stored=True)
    assert chosen_quantisation(config(model=stored, lora_dim=4)) == expected
    assert chosen_quantisation(config(model=stored, **FOUR)) == expected
    assert chosen_quantisation(config(model=stored)) is None, "which is refused where the configuration is read"
    for more, given in (
        ({"lora_dim": 4, "load_in_8bit": True}, "--load_in_8bit"),
        (FOUR | {"bnb_4bit_quant_type": "fp4"}, "--load_in_4bit"),
        (FOUR | {"bnb_4bit_use_double_quant": False}, "--load_in_4bit"),
        (FOUR | {"skip_quant": "q_proj"}, "--skip_quant 'q_proj'"),
    ):
        with pytest.raises(UserError, match=f"^{given}: .* is quantised already, in 4 bits .nf4") as refused:
            chosen_quantisation(config(model=stored, **more))
        assert f"drop {given.split()[0]}," in str(refused.value)
    with pytest.raises(UserError, match=r"^--init makes random weights, and .* has its own in 4 bits"):
        chosen_quantisation(config(model=stored, lora_dim=4, init=True))


def test_records_tell_runs_apart(stored: Path) -> None:
    runs = [
        config(lora_dim=4),
        config(**FOUR),
        config(**FOUR, bnb_4bit_quant_type="fp4"),
        config(**FOUR, bnb_4bit_use_double_quant=False),
        config(**FOUR, skip_quant="q_proj"),
        config(lora_dim=4, load_in_8bit=True),
        config(lora_dim=4, model=stored),
    ]
    records = [quantisation_record(each) for each in runs]
    assert len({json.dumps(record) for record in records}) == len(runs)
    assert len({described(record) for record in records}) == len(runs)


def adapters(family: str, skipped: str | None = None, **more: Any) -> tuple[Adapters | None, QuantisationPlan]:
    origin = tiny_config(family)
    model = causal_class(origin)
    plan = plan_quantisation(origin, model, Quantisation(bits=4, skipped=skipped), folder=Path("none"))
    return find_adapters(config(**FOUR, **more, skip_quant=skipped), origin, model, plan), plan


def test_packed_experts_in_4_bits_get_no_adapter() -> None:
    with pytest.raises(UserError, match=r"--lora_target_modules names packed experts \(model.layers.\*.mlp.experts"):
        adapters("qwen3_moe", lora_target_modules="q_proj,experts")
    found, plan = adapters("qwen3_moe", skipped="experts", lora_target_modules="q_proj,experts")
    assert found is not None
    assert found.plan.parameters
    assert not plan.experts
    assert adapters("qwen3_moe")[0] is not None


def test_what_is_quantised_is_not_trained_whole() -> None:
    more = {"precision": "fp32", "lora_dtype": "fp32", "lora_target_modules": "q_proj"}
    with pytest.raises(UserError, match=r"--modules_to_save: model.layers.\*.mlp.down_proj is in 4 bits"):
        adapters("llama", modules_to_save="down_proj", **more)
    assert adapters("llama", skipped="down_proj", modules_to_save="down_proj", **more)[0] is not None
    assert adapters("llama", modules_to_save="lm_head", **more)[0] is not None


@pytest.mark.parametrize(
    ("family", "settings", "size", "skipped", "says"),
    [
        ("llama", {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}, 2, None, None),
        ("llama", {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}, 4, None, "o_proj"),
        ("llama", {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}, 2, None, "mlp.down_proj"),
        ("llama", {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}, 2, "down_proj", None),
        ("llama", {}, 2, None, "gate_proj"),
        ("phi3", {"hidden_size": 128, "intermediate_size": 192}, 2, None, "mlp.down_proj"),
        ("qwen3_moe", {"hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 64}, 2, None, "experts.down_proj"),
        ("gpt2", {}, 2, None, None),  # its layers are not cut
    ],
)
def test_slices_in_4_bits_have_whole_blocks(
    family: str, settings: dict[str, Any], size: int, skipped: str | None, says: str | None
) -> None:
    origin = tiny_config(family, **settings)
    given = config(**FOUR, model_parallel_size=size, skip_quant=skipped)
    eight = config(lora_dim=4, load_in_8bit=True, model_parallel_size=size)
    assert find_quantisation(eight, origin, causal_class(origin)) is not None
    if says is None:
        assert find_quantisation(given, origin, causal_class(origin)) is not None
        return
    with pytest.raises(UserError, match=rf"^--model_parallel_size {size}: .*{says}.* a slice, and 64 in a row share"):
        find_quantisation(given, origin, causal_class(origin))


def test_dora_beside_8_bits() -> None:
    """peft's forward pass fails there."""
    origin = tiny_config("llama")
    model = causal_class(origin)
    plan = plan_quantisation(origin, model, Quantisation(bits=8), folder=Path("none"))
    given = config(lora_dim=4, load_in_8bit=True, use_dora=True)
    with pytest.raises(UserError, match=r"^--use_dora beside a model in 8 bits: peft has no DoRA"):
        find_adapters(given, origin, model, plan)
    assert find_adapters(config(lora_dim=4, load_in_8bit=True), origin, model, plan) is not None
