"""Files of older checkpoints: shards in an index, and one line for what is missing or broken."""

import json
from pathlib import Path

import pytest
import torch

from jllm.errors import UserError
from jllm.models.weights.source import read_config
from tests.models.chain import load_chain, packed_batch
from tests.models.legacy.published import (
    VOCAB,
    chained_logits,
    publish,
    qwen,
)

torch.set_num_threads(1)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    weights = publish("qwen", tmp_path, pickled=True)
    (tmp_path / "pytorch_model.bin").unlink()
    names = list(weights)
    files = {name: f"pytorch_model-0000{1 + n % 3}-of-00003.bin" for n, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: weights[name] for name in names if files[name] == file}, tmp_path / file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    ids = packed_batch(VOCAB)[0][0]
    torch.testing.assert_close(chained_logits(tmp_path, ids, [0, 3]), qwen(weights, ids), atol=2e-5, rtol=1e-4)
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(UserError, match=r"index\.json names 3 files, of which 1 are missing \(pytorch_model-00002-of"):
        load_chain(tmp_path, [0, 3])
    index.write_text("[]")
    with pytest.raises(UserError, match="not a weight index"):
        load_chain(tmp_path, [0, 3])


def test_mistakes(tmp_path: Path) -> None:
    publish("qwen", tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(json.dumps(config | {"rotary_pct": 0.5}))
    with pytest.raises(UserError, match="rotary_pct"):
        read_config(tmp_path / "old")
    publish("baichuan-7b", tmp_path / "pickled", pickled=True)
    whole = (tmp_path / "pickled/pytorch_model.bin").read_bytes()
    for damage in (b"", b"weights", whole[: len(whole) // 2]):
        (tmp_path / "pickled/pytorch_model.bin").write_bytes(damage)
        with pytest.raises(UserError, match="cannot be read as a file of weights"):
            load_chain(tmp_path / "pickled", [0, 3])
    del config["num_attention_heads"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="num_attention_heads"):
        read_config(tmp_path / "old")
