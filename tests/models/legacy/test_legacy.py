"""Older checkpoints: random weights in the published layout give the published arithmetic's logits.

The arithmetic below is written from the published description of each model, with no code of the package.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from jllm.commands import convert
from jllm.errors import UserError
from jllm.models.legacy.rewriting import convert_checkpoint
from jllm.models.pipeline.span import spans_of
from jllm.models.weights.loading import load_stage
from jllm.models.weights.saving import save_stage, write_companions, write_index
from jllm.models.weights.source import model_info, read_config
from tests.models.chain import chained_loss_and_gradients, kept_logits, load_chain, packed_batch

torch.set_num_threads(1)
VOCAB, WIDTH, HEADS, SIZE, INNER, LAYERS = 96, 48, 6, 8, 40, 3
Weights = dict[str, Tensor]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotate(x: Tensor, base: float) -> Tensor:
    """x: [length, heads, size]; pairs are (i, i + size / 2)."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * base ** (-torch.arange(half) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Causal attention over [length, heads, size], keys repeated to the queries' heads; `bias`: [heads, length]."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias[:, None, :]
    future = torch.ones(len(q), len(q)).triu(1).bool()
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v).flatten(1)


def qwen(w: Weights, ids: Tensor) -> Tensor:
    x = w["transformer.wte.weight"][ids]
    for n in range(LAYERS):
        p = f"transformer.h.{n}."
        h = norm(x, w[p + "ln_1.weight"])
        packed = h @ w[p + "attn.c_attn.weight"].T + w[p + "attn.c_attn.bias"]
        q, k, v = (t.unflatten(-1, (HEADS, SIZE)) for t in packed.split(WIDTH, -1))
        x = x + attend(rotate(q, 10_000.0), rotate(k, 10_000.0), v) @ w[p + "attn.c_proj.weight"].T
        h = norm(x, w[p + "ln_2.weight"])
        inner = (h @ w[p + "mlp.w1.weight"].T) * functional.silu(h @ w[p + "mlp.w2.weight"].T)
        x = x + inner @ w[p + "mlp.c_proj.weight"].T
    return norm(x, w["transformer.ln_f.weight"]) @ w["lm_head.weight"].T


def internlm2(w: Weights, ids: Tensor) -> Tensor:
    x = w["model.tok_embeddings.weight"][ids]
    for n in range(LAYERS):
        p = f"model.layers.{n}."
        h = norm(x, w[p + "attention_norm.weight"])
        # Two key heads: three query heads, a key and a value each.
        packed = (h @ w[p + "attention.wqkv.weight"].T).view(len(ids), 2, 5, SIZE)
        q, k, v = packed[:, :, :3].flatten(1, 2), packed[:, :, 3], packed[:, :, 4]
        x = x + attend(rotate(q, 1e6), rotate(k, 1e6), v) @ w[p + "attention.wo.weight"].T
        h = norm(x, w[p + "ffn_norm.weight"])
        inner = functional.silu(h @ w[p + "feed_forward.w1.weight"].T) * (h @ w[p + "feed_forward.w3.weight"].T)
        x = x + inner @ w[p + "feed_forward.w2.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["output.weight"].T


def baichuan(w: Weights, ids: Tensor, *, alibi: bool, normalised: bool) -> Tensor:
    # Six heads: the series of four, then every second one of the series of eight.
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])
    bias = slopes[:, None] * torch.arange(len(ids)) if alibi else None
    x = w["model.embed_tokens.weight"][ids]
    for n in range(LAYERS):
        p = f"model.layers.{n}."
        h = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = (t.unflatten(-1, (HEADS, SIZE)) for t in (h @ w[p + "self_attn.W_pack.weight"].T).split(WIDTH, -1))
        if not alibi:
            q, k = rotate(q, 10_000.0), rotate(k, 10_000.0)
        x = x + attend(q, k, v, bias) @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, w[p + "post_attention_layernorm.weight"])
        inner = functional.silu(h @ w[p + "mlp.gate_proj.weight"].T) * (h @ w[p + "mlp.up_proj.weight"].T)
        x = x + inner @ w[p + "mlp.down_proj.weight"].T
    head = w["lm_head.weight"]
    if normalised:
        head = head / head.square().sum(1, keepdim=True).sqrt()
    return norm(x, w["model.norm.weight"]) @ head.T


QWEN_SHAPES = {
    "transformer.wte.weight": (VOCAB, WIDTH),
    "transformer.ln_f.weight": (WIDTH,),
    "lm_head.weight": (VOCAB, WIDTH),
    "transformer.h.#.ln_1.weight": (WIDTH,),
    "transformer.h.#.ln_2.weight": (WIDTH,),
    "transformer.h.#.attn.c_attn.weight": (3 * WIDTH, WIDTH),
    "transformer.h.#.attn.c_attn.bias": (3 * WIDTH,),
    "transformer.h.#.attn.c_proj.weight": (WIDTH, WIDTH),
    "transformer.h.#.mlp.w1.weight": (INNER, WIDTH),
    "transformer.h.#.mlp.w2.weight": (INNER, WIDTH),
    "transformer.h.#.mlp.c_proj.weight": (WIDTH, INNER),
}
INTERNLM2_SHAPES = {
    "model.tok_embeddings.weight": (VOCAB, WIDTH),
    "model.norm.weight": (WIDTH,),
    "output.weight": (VOCAB, WIDTH),
    "model.layers.#.attention_norm.weight": (WIDTH,),
    "model.layers.#.ffn_norm.weight": (WIDTH,),
    "model.layers.#.attention.wqkv.weight": (2 * 5 * SIZE, WIDTH),
    "model.layers.#.attention.wo.weight": (WIDTH, WIDTH),
    "model.layers.#.feed_forward.w1.weight": (INNER, WIDTH),
    "model.layers.#.feed_forward.w3.weight": (INNER, WIDTH),
    "model.layers.#.feed_forward.w2.weight": (WIDTH, INNER),
}
BAICHUAN_SHAPES = {
    "model.embed_tokens.weight": (VOCAB, WIDTH),
    "model.norm.weight": (WIDTH,),
    "lm_head.weight": (VOCAB, WIDTH),
    "model.layers.#.input_layernorm.weight": (WIDTH,),
    "model.layers.#.post_attention_layernorm.weight": (WIDTH,),
    "model.layers.#.self_attn.W_pack.weight": (3 * WIDTH, WIDTH),
    "model.layers.#.self_attn.o_proj.weight": (WIDTH, WIDTH),
    "model.layers.#.mlp.gate_proj.weight": (INNER, WIDTH),
    "model.layers.#.mlp.up_proj.weight": (INNER, WIDTH),
    "model.layers.#.mlp.down_proj.weight": (WIDTH, INNER),
}
SIZES = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
QWEN = SIZES | {
    "model_type": "qwen",
    "intermediate_size": 2 * INNER,
    "kv_channels": SIZE,
    "layer_norm_epsilon": 1e-6,
    "seq_length": 64,
    "rotary_emb_base": 10000,
    "no_bias": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
}
INTERNLM2 = SIZES | {
    "model_type": "internlm2",
    "intermediate_size": INNER,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "max_position_embeddings": 64,
    "bias": False,
}
BAICHUAN = SIZES | {"model_type": "baichuan", "intermediate_size": INNER, "rms_norm_eps": 1e-6}
ROTARY, ALIBI = {"max_position_embeddings": 64, "model_max_length": 64}, {"model_max_length": 64}
CASES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], Callable[[Weights, Tensor], Tensor]]] = {
    "qwen": (QWEN, QWEN_SHAPES, qwen),
    "internlm2": (INTERNLM2, INTERNLM2_SHAPES, internlm2),
    "baichuan-7b": (BAICHUAN | ROTARY, BAICHUAN_SHAPES, lambda w, i: baichuan(w, i, alibi=False, normalised=False)),
    "baichuan-13b": (BAICHUAN | ALIBI, BAICHUAN_SHAPES, lambda w, i: baichuan(w, i, alibi=True, normalised=False)),
    "baichuan2-7b": (
        BAICHUAN | ROTARY | {"z_loss_weight": 0},
        BAICHUAN_SHAPES,
        lambda w, i: baichuan(w, i, alibi=False, normalised=True),
    ),
    "baichuan2-13b": (
        BAICHUAN | ALIBI | {"z_loss_weight": 0},
        BAICHUAN_SHAPES,
        lambda w, i: baichuan(w, i, alibi=True, normalised=True),
    ),
}


def publish(case: str, folder: Path, *, pickled: bool = False) -> Weights:
    """Random weights in the published layout, in two files."""
    config, shapes, _ = CASES[case]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_old.py").write_text("raise SystemExit('remote code was run')")
    generator = torch.Generator().manual_seed(1)
    weights: Weights = {}
    for pattern, shape in shapes.items():
        for name in [pattern.replace("#", str(n)) for n in range(LAYERS)] if "#" in pattern else [pattern]:
            weights[name] = torch.randn(shape, generator=generator) * 0.2 + (1.0 if len(shape) == 1 else 0.0)
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
        return weights
    files = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return weights


def chained_logits(
    folder: Path,
    ids: Tensor,
    boundaries: list[int],
    *,
    dtype: torch.dtype = torch.float32,
    positions: Tensor | None = None,
) -> Tensor:
    kept: list[Tensor] = []
    stages = load_chain(folder, boundaries, dtype=dtype)
    stages[-1].objective = kept_logits(kept)
    positions = (torch.arange(len(ids)) if positions is None else positions)[None]
    chained_loss_and_gradients(stages, ids[None], torch.stack([ids[None], positions]))
    return kept[0][0]


@pytest.mark.parametrize("case", CASES)
def test_published_arithmetic(case: str, tmp_path: Path) -> None:
    weights = publish(case, tmp_path / "old")
    ids = packed_batch(VOCAB)[0][0]
    expected = CASES[case][2](weights, ids)
    for boundaries in ([0, 3], [0, 1, 2, 3]):
        torch.testing.assert_close(chained_logits(tmp_path / "old", ids, boundaries), expected, atol=2e-5, rtol=1e-4)
    assert model_info(tmp_path / "old").vocab_size == VOCAB


@pytest.mark.parametrize("case", ["qwen", "internlm2", "baichuan-7b", "baichuan2-7b"])
def test_convert(case: str, tmp_path: Path) -> None:
    weights = publish(case, tmp_path / "old", pickled=case == "baichuan-7b")
    ids = packed_batch(VOCAB)[0][0]
    convert_checkpoint(tmp_path / "old", tmp_path / "new")
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(plain(ids[None]).logits[0], CASES[case][2](weights, ids), atol=2e-5, rtol=1e-4)
    assert not (tmp_path / "new" / "modeling_old.py").exists()


def test_a_conversion_that_ends_early_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = publish("qwen", tmp_path / "old")
    with monkeypatch.context() as broken:
        broken.setattr("jllm.models.legacy.rewriting.write_companions", None)
        with pytest.raises(TypeError):
            convert_checkpoint(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    done = CliRunner().invoke(convert.main, ["-m", str(tmp_path / "old"), "-o", str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    assert done.output.strip() == f"wrote {tmp_path / 'new'} as Qwen2ForCausalLM"
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}
    ids = packed_batch(VOCAB)[0][0]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    torch.testing.assert_close(plain(ids[None]).logits[0], qwen(weights, ids), atol=2e-5, rtol=1e-4)
    with pytest.raises(UserError, match="not empty"):
        convert_checkpoint(tmp_path / "old", tmp_path / "new")
    with pytest.raises(UserError, match="loads as it is"):
        convert_checkpoint(tmp_path / "new", tmp_path / "newer")


@pytest.mark.parametrize("case", ["baichuan-13b", "baichuan2-13b"])
def test_alibi_goes_back_to_its_layout(case: str, tmp_path: Path) -> None:
    weights = publish(case, tmp_path / "old")
    for span in spans_of([0, 1, 3]):
        model = load_stage(tmp_path / "old", span, dtype=torch.float32)
        save_stage(model, span, tmp_path / "new")
    write_companions(model, tmp_path / "new", dtype=torch.float32, source=tmp_path / "old")
    assert set(write_index(tmp_path / "new")) == set(weights)
    ids = packed_batch(VOCAB)[0][0]
    expected = CASES[case][2](weights, ids)
    torch.testing.assert_close(chained_logits(tmp_path / "new", ids, [0, 3]), expected, atol=2e-5, rtol=1e-4)
    assert (tmp_path / "new" / "modeling_old.py").exists()
    with pytest.raises(UserError, match="ALiBi"):
        convert_checkpoint(tmp_path / "old", tmp_path / "other")


def test_packed_documents_stay_apart_with_alibi(tmp_path: Path) -> None:
    publish("baichuan-13b", tmp_path)
    kept: list[Tensor] = []
    stages = load_chain(tmp_path, [0, 1, 3])
    stages[-1].objective = kept_logits(kept)
    ids, integers = packed_batch(VOCAB)
    chained_loss_and_gradients(stages, ids, integers)
    alone = torch.stack([torch.zeros(1, 9, dtype=torch.long), torch.arange(9)[None]])
    chained_loss_and_gradients(stages, ids[:1, 5:14], alone)
    torch.testing.assert_close(kept[0][:1, 5:14], kept[1], atol=1e-5, rtol=1e-4)


def test_alibi_tells_near_keys_apart_in_half_precision_wherever_in_a_row(tmp_path: Path) -> None:
    weights = publish("baichuan-13b", tmp_path)
    rounded = {name: weight.to(torch.bfloat16).float() for name, weight in weights.items()}
    ids = torch.randint(VOCAB, (1024,), generator=torch.Generator().manual_seed(2))
    document = ids[:48]
    expected = CASES["baichuan-13b"][2](rounded, document)

    def error(row: Tensor, positions: Tensor) -> float:
        found = chained_logits(tmp_path, row, [0, 1, 3], dtype=torch.bfloat16, positions=positions)
        difference = found[: len(document)].float() - expected
        return float(difference.square().mean().sqrt() / expected.square().mean().sqrt())

    alone = error(document, torch.arange(48))
    whole = error(ids, torch.arange(1024))
    packed = error(ids, torch.cat([torch.arange(48), torch.arange(976)]))
    assert alone < 0.02
    # Rounding of the rest varies a little with the length, by the kernel's blocks.
    assert max(whole, packed) < 1.2 * alone


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
