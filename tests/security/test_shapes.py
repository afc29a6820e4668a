"""Files whose JSON has another shape than it should: configurations, records, states; each is one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from jllm.data.packing.packers import StackPacker
from jllm.data.prepare.saving.chunk_cache import ChunkCache
from jllm.data.prepare.saving.sink import Sink, SinkPlan
from jllm.errors import UserError
from jllm.models.weights.source import model_info, read_config
from jllm.train.records.curves import plot
from tests.security.fuzz.targets import CONFIG, METRICS


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": None},
        {"num_hidden_layers": [2]},
        {"num_hidden_layers": 1e300},
        {"hidden_size": "8"},
        {"hidden_size": 10**12},
        {"hidden_size": {}},
        {"vocab_size": 10**30},
        {"intermediate_size": 10**400},
        {"num_attention_heads": [2]},
        {"rms_norm_eps": float("inf")},
        {"rope_parameters": {"rope_theta": float("nan"), "rope_type": "default"}},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"layer_types": ["full_attention"] * 2_000_000},
        {"model_type": ["llama"]},
        {"model_type": None},
    ],
)
def test_sizes_are_refused_before_anything_is_built(tmp_path: Path, fields: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **fields}), encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json"):
        model_info(tmp_path, with_weights=False)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"model_type": ' + "9" * 100_000 + "}", "[]", "5", '{"model_type": 1e999999}']
)
def test_a_configuration_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"holds an adapter .* --lora"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "key", ["step", "loss", "lr", "time", "memory_mib", "consumed_tokens", "event", "eval_loss", "name"]
)
@pytest.mark.parametrize(
    "value", [None, "x", [], [1, "x", None], {}, True, -1, 10**400, float("nan"), 1e308, [[1]] * 3]
)
def test_records_of_any_shape_are_drawn_or_named(tmp_path: Path, key: str, value: Any) -> None:
    lines = [
        json.dumps({**record, key: value} if number in (2, 4, 9) else record) for number, record in enumerate(METRICS)
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if key == "step" or (key == "event" and not isinstance(value, str)):
        with pytest.raises(UserError, match=r"metrics\.jsonl:3: not a record"):
            plot([path])
    else:
        plot([path])
    without = [json.dumps({name: item for name, item in record.items() if name != key}) for record in METRICS]
    path.write_text("\n".join(without) + "\n", encoding="utf-8")
    if key == "step":
        with pytest.raises(UserError, match=r"metrics\.jsonl:1: not a record"):
            plot([path])
    else:
        plot([path])


@pytest.mark.parametrize("text", ["[" * 100_000, "5\n5\n", "null\nnull\n", "[]\n[]\n", '"a"\n"b"\n', "\0\n\0\n"])
def test_other_files_are_no_records(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        plot([tmp_path])


STATE: dict[str, Any] = {
    "files": [{"path": "a-00000/a-00000-00000.zstd.parquet", "rows": 1, "tokens": 1, "trained_tokens": 1,
               "longest_row": 1, "bytes": 1, "footer": "a", "sha256": "b"}],
    "checkpoint": {"source": 0, "block": 0, "start": 0, "line": 1, "totals": {}}, "document": 0,
    "split": {"name": "a-00000", "documents": 0, "rows": 0, "packer": {}, "stems": {"a": 1}},
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"files": None},
        {"files": [{**STATE["files"][0], "path": "../../precious"}]},
        {"files": [{**STATE["files"][0], "path": "/etc/passwd"}]},
        {"files": [{**STATE["files"][0], "rows": "1"}]},
        {"files": [{**STATE["files"][0], "colour": "red"}]},
        {"checkpoint": {**STATE["checkpoint"], "source": -1}},
        {"checkpoint": {**STATE["checkpoint"], "start": 1e30}},
        {"checkpoint": []},
        {"document": "x"},
        {"split": {**STATE["split"], "name": "../out"}},
        {"split": {**STATE["split"], "stems": {"..": 1}}},
        {"split": {**STATE["split"], "stems": {"a": None}}},
        {"split": {**STATE["split"], "packer": {"ids": "x"}}},
        {"split": None},
    ],
)
def test_a_state_that_no_run_left(tmp_path: Path, change: dict[str, Any]) -> None:
    plan = SinkPlan(
        folder=tmp_path / "out", work=tmp_path, name="main", packer=StackPacker(5), codec="zstd",
        per_split=100, per_file=4,
    )  # fmt: skip
    path = tmp_path / "state-main.json"
    for text in (json.dumps({**STATE, **change}), "[" * 100_000, "[]"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"state-main\.json: not what a run left there \(.+\); start over with -C"):
            Sink(plan, ChunkCache(tmp_path, vocab_size=10, sinks=["main"]))
