"""Compiled decoder layers on CUDA, in bf16: as near to fp32 as the layers as they are, family by family.

Each family is a random model of four layers, trained on one micro-batch three times: in fp32 as it is, in bf16 as it
is, and in bf16 compiled, all with the same weights (rounded to bf16) and the attention that a run would choose. The
errors of the loss and of all gradients against fp32 are compared; compiled layers may have 1.1 times those of the
layers as they are, all gradients taken together. Families that would get flex_attention, beside which `--compile auto`
compiles nothing, are compared where they are named, and otherwise passed over.

    python tools/check_compiled.py                 the named families and some more; exit code 1 if one is worse
    python tools/check_compiled.py llama qwen3     these
    python tools/check_compiled.py --packed llama  rows of several documents
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from jllm.models.attention import choose_attention  # noqa: E402
from jllm.models.compiled import Shape, compile_layers  # noqa: E402
from jllm.models.families import NAMED  # noqa: E402
from jllm.models.kernels.available import prefer_cudnn  # noqa: E402
from jllm.models.pipeline.structure import count_layers  # noqa: E402
from jllm.models.weights.source import causal_class  # noqa: E402
from tests.models.chain import chained_loss_and_gradients, load_chain, packed_batch  # noqa: E402
from tests.models.tiny import tiny_config  # noqa: E402

MORE = (
    "olmo",
    "olmo3",
    "phi",
    "stablelm",
    "gpt_neox",
    "opt",
    "gpt2",
    "nemotron",
    "exaone4",
    "ernie4_5",
)
"""Of unlike structure, beside the named ones."""
MOST = 1.1
ROWS, LENGTH, VOCABULARY = 2, 512, 1024
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
    "sliding_window": 128,
    "initializer_range": 0.02,
}
"""Large enough for the kernels of a run; only those that a family's configuration has are used."""


def check(model_type: str, *, packed: bool, device: str, is_named: bool) -> dict[str, Any]:
    """The errors of one family against fp32, by way of computing; `is_named` if it was asked for by name."""
    plain = tiny_config(model_type)
    sizes = {name: value for name, value in SIZES.items() if hasattr(plain, name)}
    if getattr(plain, "kv_lora_rank", None):  # latent attention: its head's size is that of what is turned by positions
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
        sizes.pop("head_dim", None)
    config = tiny_config(model_type, **sizes)
    batch = [each.to(device) for each in packed_batch(VOCABULARY, batch=ROWS, length=LENGTH, packed=packed)]
    ways: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
    seconds, lines = 0.0, list[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        family = causal_class(config)
        family._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        half = choose_attention(family, device=device, dtype=torch.bfloat16)
        if half == "flex_attention" and not is_named:
            return {"family": model_type, "attention": half, "skipped": "--compile auto is off", "is_right": True}
        whole = choose_attention(family, device=device, dtype=torch.float32)
        for way, dtype in (("fp32", torch.float32), ("eager", torch.bfloat16), ("compiled", torch.bfloat16)):
            attention = whole if dtype == torch.float32 else half
            stages = load_chain(
                folder, [0, count_layers(config)], dtype=dtype, device=device, attn_implementation=attention
            )
            if way == "compiled":
                usual = Shape(ROWS, LENGTH)
                compile_layers(stages[0].model, stages[0].span, usual=usual, tell=str, warn=lines.append)
            started = time.perf_counter()
            torch.manual_seed(0)
            loss, gradients = chained_loss_and_gradients(stages, batch[0], batch[1])
            ways[way] = loss.float().cpu(), {name: value.float().cpu() for name, value in gradients.items()}
            seconds = time.perf_counter() - started
    loss, gradients = ways["fp32"]
    size = _norm(gradients)
    found: dict[str, Any] = {"family": model_type, "attention": half, "seconds": round(seconds, 1)}
    for way in ("eager", "compiled"):
        off = {name: ways[way][1][name] - value for name, value in gradients.items()}
        found[way] = {"loss": float((ways[way][0] - loss).abs()), "gradients": _norm(off) / size}
    found["notes"] = lines
    found["is_right"] = not lines and found["compiled"]["gradients"] <= MOST * found["eager"]["gradients"]
    return found


def _norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(each.double().square().sum()) for each in tensors.values()))


def main() -> int:
    """Parse, compare, print a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; default: the named ones and some more")
    parser.add_argument("--packed", action="store_true", help="rows of several documents")
    parser.add_argument("--device", default="cuda", help="where (default: cuda)")
    arguments = parser.parse_args()
    prefer_cudnn()
    worse = 0
    for model_type in arguments.types or (*NAMED, *MORE):
        torch._dynamo.reset()
        try:
            found = check(model_type, packed=arguments.packed, device=arguments.device, is_named=bool(arguments.types))
        except Exception as error:  # the others are still to be compared
            found = {"family": model_type, "is_right": False, "error": f"{type(error).__name__}: {error}"[:300]}
        worse += not found["is_right"]
        print(json.dumps(found), flush=True)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
