"""Attention of packed rows: documents by their lengths equal documents by a block mask, and each document alone."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from jllm.errors import UserError
from jllm.models import attention
from jllm.models.attention import VARLEN, DocumentBounds, choose_attention, packing, takes_varlen
from jllm.models.families import shown_by_lengths
from jllm.models.kernels import available as kernels
from jllm.models.legacy.alibi import AlibiLlamaForCausalLM
from jllm.models.weights.source import causal_class
from tests.models.chain import chained_loss_and_gradients, load_chain, packed_batch
from tests.models.family_check import kernels_by_lengths, make_folder, narrow_config
from tests.models.tiny import tiny_config

torch.set_num_threads(1)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "deepseek_v3", "cohere2", "phi3"])
def test_varlen_equals_block_mask(family: str, tmp_path: Path) -> None:
    make_folder(tiny_config(family), tmp_path)
    masked = load_chain(tmp_path, [0, 2, 4])
    by_lengths = load_chain(tmp_path, [0, 2, 4], attn_implementation=VARLEN)
    for packed in (False, True):
        ids, integers = packed_batch(96, packed=packed)
        expected = chained_loss_and_gradients(masked, ids, integers)
        found = chained_loss_and_gradients(by_lengths, ids, integers)
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)
        for name, gradient in expected[1].items():
            torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4)


TAKE_VARLEN = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3", "olmo2", "granite", "smollm3")
# Lengths do not reach the attention; the window is in the mask alone; the attention is one of the family's own.
DO_NOT = ("nemotron", "stablelm", "phimoe", "qwen2_moe", "falcon", "gpt_neo", "gptj")


def test_named_families_that_take_varlen() -> None:
    assert all(takes_varlen(causal_class(tiny_config(name))) for name in TAKE_VARLEN)
    assert not any(takes_varlen(causal_class(tiny_config(name))) for name in ("gemma2", "gpt_oss", *DO_NOT))


@pytest.mark.parametrize("family", DO_NOT)
def test_families_that_are_wrong_without_a_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They get kernels with masks, on CUDA and with flash-attn installed too."""
    where = {"device": "cuda", "dtype": torch.bfloat16}
    kind = causal_class(tiny_config(family))
    assert choose_attention(kind, **where) in ("sdpa", "eager")
    with pytest.raises(UserError, match=f"varlen: not shown to be right for {kind.__name__}") as caught:
        choose_attention(kind, **where, wanted=VARLEN)
    assert "\n" not in str(caught.value)
    _install_flash(monkeypatch, "flash_attention_2")
    assert choose_attention(kind, **where) in ("sdpa", "eager")
    with pytest.raises(UserError, match=f"flash_attention_2: not shown to be right for {kind.__name__}"):
        choose_attention(kind, **where, wanted="flash_attention_2")


@pytest.mark.parametrize(
    ("family", "kernels"),
    [
        ("llama", "varlen"),
        ("mistral", "varlen"),
        ("qwen3", "varlen"),
        ("gemma2", "flash"),
        ("gpt_oss", "flash"),
        ("nemotron", "none"),
        ("phimoe", "none"),
        ("qwen2_moe", "none"),
        ("falcon", "none"),
    ],
)
def test_what_the_catalogue_says_of_kernels(family: str, kernels: str) -> None:
    assert kernels_by_lengths(family) == kernels
    assert shown_by_lengths(causal_class(tiny_config(family))) == kernels


def test_windows_are_narrower_than_rows() -> None:
    """Else a kernel that ignores them would look right."""
    for family in ("mistral", "phimoe", "qwen2", "qwen3", "smollm3", "gemma2", "olmo3"):
        config = narrow_config(family)
        assert config.sliding_window == 8
        assert "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])


def test_code_that_was_not_walked_has_masks() -> None:
    """A class that comes with a model and calls itself like a known type, and types that are not in the catalogue."""

    class LlamaConfig(transformers.LlamaConfig):
        model_type = "unheard_of"

    class Own(transformers.LlamaForCausalLM):
        config_class = transformers.LlamaConfig

    class Unknown(transformers.LlamaForCausalLM):
        __module__ = transformers.LlamaForCausalLM.__module__
        config_class = LlamaConfig

    for family in (Own, Unknown, AlibiLlamaForCausalLM):
        assert choose_attention(family, device="cuda", dtype=torch.bfloat16) == "sdpa"
        with pytest.raises(UserError, match="not shown"):
            choose_attention(family, device="cuda", dtype=torch.bfloat16, wanted=VARLEN)


def test_documents_from_positions(tmp_path: Path) -> None:
    make_folder(tiny_config("llama"), tmp_path)
    model = load_chain(tmp_path, [0, 4], attn_implementation=VARLEN)[0].model
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 0]])
    found = packing(model, positions)
    assert found["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 11, 12]
    assert found["cu_seq_lens_q"].dtype == torch.int32
    assert found["max_length_k"] == 5
    assert packing(model, torch.arange(6).repeat(2, 1)) == {}
    assert packing(load_chain(tmp_path, [0, 4])[0].model, positions) == {}


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 40))
def test_bounds_are_known_without_a_look(rows: list[list[int]], further: int) -> None:
    """What the device makes of positions, told most and longest, is what the host reads out of them."""
    width = max(map(sum, rows))
    # Padding belongs to the last document of a row.
    rows = [[*row[:-1], row[-1] + width - sum(row)] for row in rows]
    positions = torch.tensor([[place for length in row for place in range(length)] for row in rows])
    known = DocumentBounds.of([positions])
    lengths = [length for row in rows for length in row]
    assert known == DocumentBounds(most=len(lengths), longest=max(lengths))
    # Another micro-batch of the step may have more.
    more = dataclasses.replace(known, most=known.most + further)
    found = more.bounds(attention._starts(positions))
    assert found.dtype == torch.int32
    assert len(found) > more.most
    expected = [0, *itertools.accumulate(lengths)]
    assert found.tolist() == expected + [positions.numel()] * (len(found) - len(expected))


def test_choice() -> None:
    llama, oss = (causal_class(tiny_config(name)) for name in ("llama", "gpt_oss"))
    assert choose_attention(llama, device="cpu", dtype=torch.float32) == "sdpa"
    assert choose_attention(llama, device="cuda", dtype=torch.bfloat16) in (VARLEN, "flash_attention_2")
    assert choose_attention(oss, device="cuda", dtype=torch.bfloat16) == "flex_attention"
    assert choose_attention(llama, device="cuda", dtype=torch.float32) == "sdpa"
    assert choose_attention(oss, device="cpu", dtype=torch.float32) == "eager"
    assert choose_attention(llama, device="cpu", dtype=torch.float32, wanted="eager") == "eager"
    with pytest.raises(UserError, match="give one of"):
        choose_attention(llama, device="cpu", dtype=torch.float32, wanted="fast")
    with pytest.raises(UserError, match="varlen: not shown to be right for GptOssForCausalLM"):
        choose_attention(oss, device="cuda", dtype=torch.bfloat16, wanted=VARLEN)
    with pytest.raises(UserError, match="needs CUDA"):
        choose_attention(llama, device="cpu", dtype=torch.float32, wanted="flash_attention_2")
    with pytest.raises(UserError, match="no backward pass for it on cpu"):
        choose_attention(llama, device="cpu", dtype=torch.float32, wanted="flex_attention")
    with pytest.raises(UserError, match="does not offer it"):
        choose_attention(oss, device="cpu", dtype=torch.float32, wanted="sdpa")


def test_sdpa_is_not_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA has no soft cap, whatever a version of transformers says of Gemma 2."""
    gemma2, gemma3 = (causal_class(tiny_config(name)) for name in ("gemma2", "gemma3_text"))
    monkeypatch.setattr(gemma2, "_supports_sdpa", True)
    assert choose_attention(gemma2, device="cpu", dtype=torch.float32) == "eager"
    assert choose_attention(gemma2, device="cuda", dtype=torch.bfloat16) == "flex_attention"
    assert choose_attention(gemma3, device="cpu", dtype=torch.float32) == "sdpa"


def test_choice_with_attention_dropout() -> None:
    """Starcoder 2 is published with it; varlen and flex have none."""
    starcoder2, gemma2 = (causal_class(tiny_config(name)) for name in ("starcoder2", "gemma2"))
    where = {"device": "cuda", "dtype": torch.bfloat16}
    assert choose_attention(starcoder2, **where) == VARLEN
    assert choose_attention(starcoder2, **where, dropout=0.1) == "sdpa"
    assert choose_attention(gemma2, **where, dropout=0.1) == "eager"
    for wanted, family in ((VARLEN, starcoder2), ("flex_attention", gemma2)):
        with pytest.raises(UserError, match="has attention dropout"):
            choose_attention(family, **where, wanted=wanted, dropout=0.1)


def test_choice_where_flash_attention_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes first, but not for families whose attention sinks it does not know."""
    llama, gemma2, oss = (causal_class(tiny_config(name)) for name in ("llama", "gemma2", "gpt_oss"))
    _install_flash(monkeypatch, "flash_attention_2")
    where = {"device": "cuda", "dtype": torch.bfloat16}
    assert choose_attention(llama, **where) == "flash_attention_2"
    assert choose_attention(gemma2, **where) == "flash_attention_2"
    assert choose_attention(oss, **where) == "flex_attention"
    assert choose_attention(llama, **where, wanted="flash_attention_2") == "flash_attention_2"
    with pytest.raises(UserError, match="does not offer it"):
        choose_attention(oss, **where, wanted="flash_attention_2")


def test_flash_attention_4_is_for_heads_that_it_can_train(monkeypatch: pytest.MonkeyPatch) -> None:
    llama, gemma2 = (causal_class(tiny_config(name)) for name in ("llama", "gemma2"))
    _install_flash(monkeypatch, "flash_attention_4", "flash_attention_2")
    where = {"device": "cuda", "dtype": torch.bfloat16}
    assert choose_attention(llama, **where, head_size=128) == "flash_attention_4"
    assert choose_attention(llama, **where, head_size=256) == "flash_attention_2"
    assert choose_attention(llama, **where) == "flash_attention_2"
    assert choose_attention(gemma2, **where, head_size=128) == "flash_attention_2"
    assert choose_attention(llama, **where, wanted="flash_attention_4") == "flash_attention_4"


def _install_flash(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr("jllm.models.kernels.available.is_installed", lambda name: name in names)


def test_flex_attention_has_no_backward_pass_on_cpu() -> None:
    """Why it is refused there. Where this fails, PyTorch has learned it, and the refusal can go."""
    query, key, value = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        flex_attention(query, key, value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex_attention trains on CUDA only")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("packed", [False, True])
def test_flex_equals_eager(family: str, packed: bool, tmp_path: Path) -> None:
    make_folder(tiny_config(family, head_dim=16, max_position_embeddings=256, sliding_window=48), tmp_path)
    ids, integers = (tensor.cuda() for tensor in packed_batch(96, length=192, packed=packed))
    found = {}
    for implementation in ("eager", "flex_attention"):
        stages = load_chain(tmp_path, [0, 2, 4], device="cuda", attn_implementation=implementation)
        found[implementation] = chained_loss_and_gradients(stages, ids, integers)
    torch.testing.assert_close(found["flex_attention"][0], found["eager"][0], atol=1e-4, rtol=0)
    for name, gradient in found["eager"][1].items():
        torch.testing.assert_close(found["flex_attention"][1][name], gradient, atol=1e-3, rtol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("further", [0, 40])
def test_empty_documents_at_the_end_change_nothing(further: int) -> None:
    """On CUDA the bounds of a micro-batch may go on behind its last document."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0] * 16, [*range(128)]], device="cuda")
    known = DocumentBounds.of([positions.cpu()])
    is_start = attention._starts(positions)
    exact = torch.cat([is_start.flatten().nonzero()[:, 0], is_start.new_tensor([256], dtype=torch.int64)])
    more = dataclasses.replace(known, most=known.most + further)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(256, heads, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for heads in (8, 2, 2)
    )
    found = []
    for bounds in (exact.to(torch.int32), more.bounds(is_start)):
        attended = kernels.by_lengths(query, key, value, bounds, known.longest, None, None)
        gradients = torch.autograd.grad(attended.float().square().sum(), (query, key, value))
        found.append([attended, *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-2)
