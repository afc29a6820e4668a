"""`--ds_config` adds to the options and never contradicts them; what DeepSpeed does not read is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from jllm.errors import UserError
from jllm.train.config import TrainConfig
from jllm.train.distributed.deepspeed_settings import NOT_IN_A_PIPELINE, deepspeed_settings
from jllm.train.shape import resolve_shape


def settings(folder: Path, given: Any, **more: Any) -> dict[str, Any]:
    (folder / "ds.json").write_text(given if isinstance(given, str) else json.dumps(given))
    options: dict[str, Any] = {"precision": "fp32", **more}
    config = TrainConfig(model=Path("model"), train_data=("data",), ds_config=folder / "ds.json", **options)
    return deepspeed_settings(config, resolve_shape(config, 2))


def test_what_is_added_comes_through(tmp_path: Path) -> None:
    given = {
        "zero_optimization": {"reduce_bucket_size": 1000, "stage": 0},
        "fp16": {"loss_scale": "auto", "initial_scale_power": 8},
        "wall_clock_breakdown": True,
        "communication_data_type": "fp32",
        "comms_logger": {"enabled": False, "verbose": False},
        "gradient_clipping": "auto",
        "train_batch_size": 2,
        "optimizer": "auto",
        "activation_checkpointing": {},
    }
    found = settings(tmp_path, given)
    assert found["zero_optimization"] == {"reduce_bucket_size": 1000, "stage": 0}
    assert found["fp16"] == {"initial_scale_power": 8, "enabled": False}
    assert (found["wall_clock_breakdown"], found["communication_data_type"]) == (True, "fp32")
    assert found["gradient_clipping"] == 1.0


def test_every_field_of_zero_is_known_and_a_letter_more_is_not(tmp_path: Path) -> None:
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        key = field.alias or name
        value = field.get_default(call_default_factory=True)
        if (
            not isinstance(value, bool | int | str)
            or name == "stage"
            or f"zero_optimization.{key}" in NOT_IN_A_PIPELINE
        ):
            continue
        settings(tmp_path, {"zero_optimization": {key: value}})
        with pytest.raises(UserError, match=f"DeepSpeed has no setting zero_optimization.{key}x. Did you mean"):
            settings(tmp_path, {"zero_optimization": {f"{key}x": value}})


@pytest.mark.parametrize("name", NOT_IN_A_PIPELINE)
def test_what_a_pipeline_does_not_have(tmp_path: Path, name: str) -> None:
    part, _, key = name.rpartition(".")
    for value, refused in ((True, True), ({"enabled": True}, True), ("auto", False), (False, False)):
        given = {part: {key: value}} if part else {key: value}
        if refused:
            with pytest.raises(UserError, match=f"--ds_config: {name} is not for a pipeline of jllm"):
                settings(tmp_path, given)
        elif value == "auto":
            settings(tmp_path, given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("[1]", "holds a JSON list"),
        ("{", "not valid JSON"),
        ('{"a": ' * 3000, "not valid JSON"),
        ({"bf16": {"enabled": True}}, "bf16.enabled = True contradicts the options \\(False\\)"),
        ({"bfloat16": {"enabled": True}}, "bf16.enabled = True contradicts"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage = 2 contradicts the options \\(0\\)"),
        ({"train_micro_batch_size_per_gpu": True}, "train_micro_batch_size_per_gpu = True contradicts"),
        ({"fp16": 1}, "fp16 = 1: give an object"),
        ({"steps_per_prynt": 1}, 'no setting steps_per_prynt. Did you mean "steps_per_print"'),
        ({"fp16": {"hysteresis": "much"}}, "fp16.hysteresis = 'much': Input should be"),
        (
            {"flops_profiler": {"profile_step": "x"}},
            "flops_profiler.profile_step = 'x': DeepSpeed takes a value like 1",
        ),
        ({"dump_state": 3}, "dump_state = 3: DeepSpeed takes a value like False"),
        ({"elasticity": {"enabled": True}}, "DeepSpeed refuses it: Elastic"),
    ],
)
def test_one_line_with_the_setting(tmp_path: Path, given: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"^--ds_config.*{said}"):
        settings(tmp_path, given)


def test_without_a_file_nothing_is_asked() -> None:
    config = TrainConfig(model=Path("model"), train_data=("data",))
    found = deepspeed_settings(config, resolve_shape(config, 1))
    assert found["zero_optimization"] == {"stage": 1}
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}
