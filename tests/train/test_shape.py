"""Processes and batches: divided exactly, or refused with what would fit."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jllm.errors import UserError
from jllm.train.config import TrainConfig
from jllm.train.shape import RunShape, automatic_options, resolve_shape


def shape_of(world_size: int, **options: Any) -> RunShape:
    return resolve_shape(config_of(**options), world_size)


def config_of(**options: Any) -> TrainConfig:
    return TrainConfig(model=Path("model"), train_data=("data",), **options)


@given(pipe=st.integers(1, 6), data=st.integers(1, 6), rows=st.integers(1, 4), accumulation=st.integers(1, 5))
def test_what_is_given_as_a_whole_is_divided(pipe: int, data: int, rows: int, accumulation: int) -> None:
    whole = rows * accumulation * data
    options = {"pipe_parallel_size": pipe, "per_device_train_batch_size": rows}
    by_rows = shape_of(pipe * data, **options, global_batch_size=whole)
    assert by_rows == shape_of(pipe * data, **options, gradient_accumulation_steps=accumulation)
    assert (by_rows.mesh.pipe, by_rows.mesh.data, by_rows.accumulation) == (pipe, data, accumulation)
    assert by_rows.global_batch == whole
    assert by_rows.mesh.world_size == pipe * data
    assert by_rows.processes == f"{pipe} stages x {data} pipelines"


@pytest.mark.parametrize(
    ("world_size", "options", "says"),
    [
        (6, {"pipe_parallel_size": 4}, "--pipe_parallel_size 4 does not divide the 6 processes of this run; give a"),
        (2, {"pipe_parallel_size": 4}, "--pipe_parallel_size 4 does not divide the 2 processes"),
        (4, {"global_batch_size": 6}, r"1 x 4 data-parallel pipelines = 4; give a multiple of it"),
        (4, {"global_batch_size": 3}, r"--global_batch_size 3 is not a multiple of"),
    ],
)
def test_what_does_not_divide_is_refused(world_size: int, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        shape_of(world_size, **options)
    assert "\n" not in str(caught.value)


def test_slices() -> None:
    """Those of a stage are neighbours, whatever the order of the others."""
    options = {"pipe_parallel_size": 2, "model_parallel_size": 2}
    shape = shape_of(8, **options)
    assert shape.processes == "2 stages x 2 slices x 2 pipelines"
    assert config_of(**options).wanted_processes == 4
    assert shape.mesh.pipelines == ((0, 1, 2, 3), (4, 5, 6, 7))
    by_stage = shape_of(8, **options, column_major_topology=False).mesh
    assert by_stage.stages == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert by_stage.pipelines == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert by_stage.groups("tensor") == shape.mesh.groups("tensor") == ((0, 1), (2, 3), (4, 5), (6, 7))
    with pytest.raises(UserError, match="--pipe_parallel_size 2 x --model_parallel_size 2 = 4 does not divide the 6"):
        shape_of(6, **options)


def test_shared_rows() -> None:
    """Sequence ranks lie between stages and slices, and are copies of a stage's weights."""
    options = {"pipe_parallel_size": 2, "sequence_parallel_size": 2, "model_parallel_size": 2}
    shape = shape_of(16, **options, global_batch_size=4)
    assert shape.processes == "2 stages x 2 runs of tokens x 2 slices x 2 pipelines"
    assert (shape.accumulation, shape.global_batch, shape.mesh.copies) == (2, 4, 4)
    assert config_of(**options).wanted_processes == 8
    assert shape.mesh.groups("sequence")[:3] == ((0, 2), (1, 3), (4, 6))
    assert shape.mesh.groups("pipe")[:2] == ((0, 4), (1, 5))
    assert [shape.mesh.place(rank).copy for rank in (0, 2, 8, 10)] == [0, 1, 2, 3]
    says = "--pipe_parallel_size 2 x --sequence_parallel_size 2 x --model_parallel_size 2 = 8 does not divide the 12"
    with pytest.raises(UserError, match=says):
        shape_of(12, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"attn_implementation": "eager"}, "--attn_implementation eager"),
        ({"lora": Path("adapter")}, "--lora"),
        ({"lora_dim": 4, "lora_compute": "model"}, "--lora_compute model"),
        ({"neftune_alpha": 5.0}, "--neftune_alpha"),
    ],
)
def test_what_shared_rows_were_not_shown_with_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(
        UserError, match=f"--sequence_parallel_size 2 with {named}: shared rows were not shown"
    ) as caught:
        config_of(**{"precision": "fp32", **options}, sequence_parallel_size=2)
    assert "\n" not in str(caught.value)


def test_rows_of_fewer_tokens_than_processes_are_refused() -> None:
    with pytest.raises(UserError, match="--sequence_parallel_size 4: rows of --seq_len 3 leave nothing for some"):
        config_of(seq_len=3, sequence_parallel_size=4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lora": Path("adapter")}, "--lora"),
        ({"lora_dim": 4, "use_dora": True}, "--use_dora"),
        ({"lora_dim": 4, "lora_dropout": 0.1}, "--lora_dropout"),
        ({"lora_dim": 4, "modules_to_save": "lm_head"}, "--modules_to_save"),
        ({"lora_dim": 4, "only_ckpt_lora": True, "checkpoint": Path("c")}, "--only_ckpt_lora"),
        ({"control_adapter_rank": 2}, "--control_adapter_rank"),
        ({"precision": "bf16", "fp8": "tensorwise"}, "--fp8 tensorwise"),
        ({"fused_loss": "on", "loss": "dpo"}, "--loss dpo and --fused_loss on"),
        ({"optimizer": "muon"}, "--optimizer muon"),
        ({"precision": "fp16"}, "--precision fp16"),
        ({"optimizer": "adamw_8bit"}, "--optimizer adamw_8bit"),
        ({"only_ckpt_model": True, "checkpoint": Path("c")}, "--only_ckpt_model"),
        ({"partition_method": "profile"}, "--partition_method profile"),
    ],
)
def test_what_slices_were_not_shown_with_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"--model_parallel_size 2 with {named}: slices were not shown"):
        config_of(**{"precision": "fp32", **options}, model_parallel_size=2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model_parallel_size": 1}, "is for slices of a stage; give --model_parallel_size, or drop it"),
        ({"lora_dim": 4}, "with --lora_dim 4: tokens shared by slices were not shown to work with it"),
        ({"sequence_parallel_size": 2}, "with --sequence_parallel_size 2: tokens shared by slices were not shown"),
    ],
)
def test_what_tokens_shared_by_slices_were_not_shown_with(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"--sequence_sharded_norms.* {says}"):
        config_of(**{"precision": "fp32", "model_parallel_size": 2, **options}, sequence_sharded_norms=True)


def test_an_option_of_others_names_ours() -> None:
    with pytest.raises(UserError, match="or give --sequence_sharded_norms"):
        config_of(async_tensor_model_parallel_allreduce=True)


def test_values_that_follow() -> None:
    config = config_of(global_batch_size=8, checkpoint=Path("run"))
    values = automatic_options(config, resolve_shape(config, 2))
    assert values == {"zero_stage": 1, "gradient_accumulation_steps": 4, "log_dir": "run/log"}
    by_tokens = config_of(batch_size_tokens=64)
    assert "global_batch_size" not in automatic_options(by_tokens, resolve_shape(by_tokens, 2))


def test_what_tokens_shared_by_slices_were_not_shown_with_is_refused_by_name() -> None:
    for more, named in (
        ({"compile": "on"}, "--compile on"),
        ({"lora_dim": 4}, "--lora_dim 4"),
        ({"neftune_alpha": 5.0}, "--neftune_alpha"),
    ):
        with pytest.raises(UserError, match=f"--sequence_sharded_norms with {named}: tokens shared by slices were not"):
            config_of(model_parallel_size=2, sequence_sharded_norms=True, **more)
