"""Merging an adapter: how much memory the command needs over what its imports take, against the size of the model.

Makes a random Llama (bf16, in four files) and a LoRA of rank 16 on every linear map of its layers, then runs `jllm
merge` on it and on a model of one narrow layer, and takes the peak of resident memory of each as the kernel reports it.
Their difference is what the larger model costs. Prints one JSON line; the bar is the largest file of the model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RANK = 16
MAPS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def make(folder: str, layers: int, width: int) -> None:
    """Write the random model, one stage at a time, and the adapter."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from jllm.models.pipeline.partition import partition
    from jllm.models.pipeline.span import spans_of
    from jllm.models.weights.loading import init_stage
    from jllm.models.weights.saving import save_stage, write_companions, write_index

    config = LlamaConfig(
        vocab_size=32_000 if layers > 1 else 100,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
    )
    base, adapter = Path(folder) / "base", Path(folder) / "adapter"
    for span in spans_of(partition("uniform", config=config, num_stages=min(4, layers))):
        model = init_stage(config, span, dtype=torch.bfloat16, seed=0)
        save_stage(model, span, base)
    write_companions(model, base, dtype=torch.bfloat16)
    write_index(base)
    tensors: dict[str, Any] = {}
    keys = max(1, width // 256) * 64
    rows = {"k_proj": keys, "v_proj": keys, "gate_proj": 4 * width, "up_proj": 4 * width}
    for layer in range(layers):
        for name in MAPS:
            leaf = name.rpartition(".")[2]
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, 4 * width if leaf == "down_proj" else width) / 100
            tensors[f"{path}.lora_B.weight"] = torch.randn(rows.get(leaf, width), RANK) / 100
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    leaves = [name.rpartition(".")[2] for name in MAPS]
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "target_modules": leaves}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))


def merge(folder: str) -> tuple[int, float]:
    """Peak of resident bytes of the command, and its seconds."""
    began = time.perf_counter()
    words = ["merge", "-m", f"{folder}/base", "--lora", f"{folder}/adapter", "-o", f"{folder}/merged"]
    process = subprocess.Popen([sys.executable, "-m", "jllm", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    return usage.ru_maxrss * 1024, time.perf_counter() - began


def main() -> int:
    """Make and merge both models, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=18, help="decoder layers of 61 M parameters each")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, default=2048, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.make, arguments.layers, arguments.width)
        return 0
    peaks = []
    for layers, width in ((1, 256), (arguments.layers, arguments.width)):
        with tempfile.TemporaryDirectory() as folder:
            making = [sys.executable, __file__, "--make", folder, "--layers", str(layers), "--width", str(width)]
            subprocess.run(making, check=True)
            sizes = [path.stat().st_size for path in Path(folder, "base").glob("*.safetensors")]
            adapter = Path(folder, "adapter/adapter_model.safetensors").stat().st_size
            peak, seconds = merge(folder)
            peaks.append(peak)
    grown = peaks[1] - peaks[0]
    result = {
        "benchmark": "merge_memory",
        "model_mib": sum(sizes) >> 20,
        "largest_file_mib": max(sizes) >> 20,
        "adapter_mib": adapter >> 20,
        "imports_mib": peaks[0] >> 20,
        "peak_over_imports_mib": grown >> 20,
        "ratio": round(grown / max(sizes), 3),
        "bar": 1.0,
        "seconds": round(seconds, 1),
    }
    print(json.dumps(result))
    return 0 if grown <= max(sizes) else 1


if __name__ == "__main__":
    sys.exit(main())
