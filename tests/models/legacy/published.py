"""Older checkpoints as they were published: random weights in each layout, and the arithmetic of each.

The arithmetic is written from the published description of each model, with no code of the package.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from tests.models.chain import chained_loss_and_gradients, kept_logits, load_chain

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
