"""The options in the log folder: `--config` reads them back, and a run that goes on leaves those of the first start."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from jllm.train.config import TrainConfig
from jllm.train.records.config_record import record_options, toml_of
from jllm.train.shape import resolve_shape
from tests.train.records.flags import parse

GIVEN: dict[str, Any] = {
    "model": Path('a "model"\\with\x7f strange\tname ü'),
    "train_data": ("web=2.5", "books"),
    "eval_data": ("held=eval",),
    "learning_rate": 1e-30,
    "weight_decay": 3,
    "global_batch_size": 8,
    "block_mask": True,
    "partition_method": "type:.*",
    "checkpoint": Path("run"),
    "target_modules": "q_proj,v_proj",
}


@pytest.mark.parametrize("given", [GIVEN, {"model": Path("model"), "train_data": ("data",)}])
def test_config_reads_what_was_recorded(tmp_path: Path, given: dict[str, Any]) -> None:
    config = TrainConfig(**given, local_rank=1)
    path = tmp_path / "log/config.toml"
    record_options(path.parent, config, resolve_shape(config, 4), first_step=1)
    assert dataclasses.replace(parse("--config", str(path)), config=None, local_rank=1) == config
    assert parse("--config", str(path), "--seed", "7").seed == 7


def test_values_that_were_set_automatically_are_there_as_comments() -> None:
    config = TrainConfig(model=Path("model"), train_data=("data",), global_batch_size=8, output_dir=Path("out"))
    lines = toml_of(config, resolve_shape(config, 2)).splitlines()
    assert lines[0].startswith("# jllm ")
    assert "1 stages x 2 pipelines on 2 processes" in lines[0]
    for line in (
        "# zero_stage = 1, not given",
        "# gradient_accumulation_steps = 4, not given",
        "global_batch_size = 8",
    ):
        assert line in lines
    assert '# log_dir = "out/log", not given' in lines
    assert "# seq_len is not given" in lines


def test_a_run_that_goes_on_leaves_the_first_record(tmp_path: Path) -> None:
    def start(first_step: int, **more: Any) -> list[str]:
        config = TrainConfig(**{**GIVEN, **more})
        record_options(tmp_path, config, resolve_shape(config, 1), first_step=first_step)
        return sorted(path.name for path in tmp_path.iterdir())

    assert start(1) == ["config.toml"]
    first = (tmp_path / "config.toml").read_text()
    assert start(41, seed=1) == ["config-from-step-00000041.toml", "config.toml"]
    assert (tmp_path / "config.toml").read_text() == first
    assert "seed = 1\n" in (tmp_path / "config-from-step-00000041.toml").read_text()
    # Going on from an earlier step makes the later steps, and how they were made, obsolete, as in metrics.jsonl.
    assert start(6) == ["config-from-step-00000006.toml", "config.toml"]
    assert start(41)[:2] == ["config-from-step-00000006.toml", "config-from-step-00000041.toml"]
    assert start(1) == ["config.toml"]
