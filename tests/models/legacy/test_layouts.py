"""Older checkpoints: random weights in the published layout give the published arithmetic's logits."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from jllm.errors import UserError
from jllm.models.weights.source import model_info, read_config
from tests.models.chain import packed_batch
from tests.models.legacy.published import (
    ALIBI,
    BAICHUAN,
    CASES,
    INTERNLM2,
    QWEN,
    ROTARY,
    VOCAB,
    chained_logits,
    publish,
)

torch.set_num_threads(1)


@pytest.mark.parametrize("case", CASES)
def test_published_arithmetic(case: str, tmp_path: Path) -> None:
    weights = publish(case, tmp_path / "old")
    ids = packed_batch(VOCAB)[0][0]
    expected = CASES[case][2](weights, ids)
    for boundaries in ([0, 3], [0, 1, 2, 3]):
        torch.testing.assert_close(chained_logits(tmp_path / "old", ids, boundaries), expected, atol=2e-5, rtol=1e-4)
    assert model_info(tmp_path / "old").vocab_size == VOCAB


def refused(config: dict[str, Any], folder: Path) -> str:
    """The one line that refuses a configuration."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        read_config(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"visual": {"heads": 16, "layers": 48}}, "has a part 'visual'"),
        ({"audio": {"n_layer": 32}}, "has a part 'audio'"),
        ({"scale_attn_weights": False}, "scale_attn_weights False; only true is known"),
        ({"apply_residual_connection_post_layernorm": True}, "only false is known"),
        ({"emb_dropout_prob": 0.1}, "emb_dropout_prob 0.1; only 0.0 is known"),
        ({"kv_channels": 16}, r"kv_channels 16 and 6 heads in a hidden_size of 48; only .* \(8\) is known"),
        ({"kv_channels": None}, r"kv_channels left out \(128, then\) and 6 heads in a hidden_size of 48"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config \{'bits': 4\}; only none"),
    ],
)
def test_what_is_not_known_of_qwen_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    config = {key: value for key, value in (QWEN | change).items() if value is not None}
    assert re.search(said, refused(config, tmp_path))


@pytest.mark.parametrize("config", [INTERNLM2, BAICHUAN | ROTARY, BAICHUAN | ALIBI])
def test_quantised_weights_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    assert "quantization_config" in refused(config | {"quantization_config": {"bits": 8}}, tmp_path)
