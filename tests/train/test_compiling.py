"""Whether a run compiles, why not, for which shape, and where the code is kept."""

import os
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch._inductor.runtime import cache_dir_utils

from jllm.errors import UserError
from jllm.models.compiled import Shape
from jllm.models.families import shown_compiled
from jllm.models.weights.quantisation import Quantisation, QuantisationPlan
from jllm.models.weights.source import causal_class
from jllm.parallel.mesh import Mesh
from jllm.train.compiling import choose_compiling, keep_code_private, usual_shape
from jllm.train.config import TrainConfig
from jllm.train.shape import RunShape
from tests.models.tiny import tiny_config


def config(**options: Any) -> TrainConfig:
    return TrainConfig(model=Path("model"), train_data=("data",), **options)


def choice(
    family: str = "llama",
    device: str = "cuda:0",
    *,
    attention: str = "varlen",
    quantised: QuantisationPlan | None = None,
    **options: Any,
) -> str:
    kind = causal_class(tiny_config(family))
    found = choose_compiling(config(**options), kind, device=device, attention=attention, quantised=quantised)
    assert found.is_on == found.said.startswith("decoder layers are compiled")
    return found.said


def test_choice() -> None:
    assert choice() == choice(precision="fp32") == "decoder layers are compiled"
    assert "the device is cpu (--compile on does it)" in choice(device="cpu")
    assert choice(device="cpu", compile="on") == "decoder layers are compiled"
    assert "--precision fp16" in choice(precision="fp16")
    maps, experts = frozenset({"model.layers.0.mlp.up_proj"}), frozenset({"model.layers.0.mlp.experts.down_proj"})
    for bits, packed, said in (
        (4, frozenset[str](), "decoder layers are compiled"),
        (4, experts, "packed experts are quantised"),
        (8, frozenset[str](), "held in 8 bits"),
    ):
        held = QuantisationPlan(quantisation=Quantisation(bits=bits), modules=maps, experts=packed)
        assert said in choice(quantised=held)
    assert "attention is flex_attention" in choice("gpt_oss", attention="flex_attention")
    assert "not shown to be right for Qwen3NextForCausalLM" in choice("qwen3_next")
    assert "not shown to be right for Qwen3NextForCausalLM" in choice("qwen3_next", compile="on")
    assert choice(compile="off") == "decoder layers are not compiled: --compile off"


def test_a_budget_needs_compiled_layers() -> None:
    assert choice(activation_memory_budget=0.5) == choice()
    with pytest.raises(UserError, match=r"^--activation_memory_budget 0.5 is for compiled layers, and --compile off"):
        config(activation_memory_budget=0.5, compile="off")
    with pytest.raises(UserError, match=r"^--activation_memory_budget 0.5 .* they are not: the device is cpu; give"):
        choice(device="cpu", activation_memory_budget=0.5)


def test_code_that_comes_with_a_model_was_shown_nothing_of() -> None:
    class Own(transformers.LlamaForCausalLM):
        config_class = transformers.LlamaConfig

    assert shown_compiled(transformers.LlamaForCausalLM)
    assert not shown_compiled(Own)


def test_usual_shape() -> None:
    shape = RunShape(mesh=Mesh(), micro_batch=3, accumulation=2)
    assert usual_shape(config(seq_len=100), shape, None) == Shape(3, 100)
    assert usual_shape(config(seq_len=100), shape, 71) == Shape(3, 100)
    assert usual_shape(config(seq_len=4096), shape, 71) == Shape(3, 128)
    assert usual_shape(config(), shape, 65) == Shape(3, 64)
    assert usual_shape(config(), shape, None) is None
    assert usual_shape(config(seq_len=100, batch_size_tokens=1000), shape, 71) is None


def test_code_is_kept_where_nobody_else_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config as inductor

    with inductor.patch(compile_threads=32):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", cache_dir_utils.default_cache_dir())
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "own"))
        keep_code_private()
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert folder == tmp_path / "cache/jllm/compiled"
        assert folder.stat().st_mode & 0o777 == 0o700
        assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "own")
        assert 1 <= inductor.compile_threads <= 8
    folder.chmod(0o777)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_code_private()
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) != folder
