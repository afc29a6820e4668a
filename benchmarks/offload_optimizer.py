"""`--offload_optimizer` on one device: memory and speed beside the same run without it, and the update beside DeepSpeed's.

A Llama with random weights (1.2 B parameters by default) is trained whole in bf16 with and without the option, each in a
process of its own. Then one AdamW update of fp32 tensors on the host is timed, as the trainer makes it (torch's fused
kernel) and by DeepSpeed's `DeepSpeedCPUAdam`, which compiles itself first; where it does not compile, it is left out.
Prints one JSON line: peak memory, median tokens per second, last losses, and seconds of an update of 100 M numbers.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
WARM_UP = 2


def train(folder: Path, options: argparse.Namespace, *, offloads: bool) -> dict[str, Any]:
    """One run of the trainer."""
    log = folder / f"log-{offloads}"
    command = [sys.executable, "-m", "jllm", "train", "--processes", "1", "-m", str(folder / "model"), "--init"]
    command += ["--train_data", str(folder / "data"), "--seq_len", str(options.length), "--force_tokenizer"]
    command += ["--gradient_accumulation_steps", str(options.accumulation), "--max_steps", str(options.steps)]
    command += ["--checkpoint_grad_interval", "1", "--learning_rate", "1e-4", "--log_dir", str(log)]
    command += ["--offload_optimizer"] * offloads
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    lines = (log / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    return {
        "tokens_per_second": round(statistics.median(each["tokens_per_second"] for each in records[WARM_UP:]), 1),
        "memory_mib": max(max(each["memory_mib"]) for each in records),
        "loss": records[-1]["loss"],
    }


def seconds_of_update(kind: str, numbers: int) -> float | None:
    """The median of five updates on the host; None where the optimizer is not to be had."""
    import torch

    weights = [torch.zeros(numbers // 10, requires_grad=True) for _ in range(10)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer: Any
    if kind == "torch":
        optimizer = torch.optim.AdamW(weights, fused=True)
    else:
        try:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            optimizer = DeepSpeedCPUAdam(weights)
        except Exception:  # whatever a compiler says
            return None
    found = []
    for _ in range(6):
        started = time.perf_counter()
        optimizer.step()
        found.append(time.perf_counter() - started)
    return round(statistics.median(found[1:]), 4)


def main() -> int:
    """Make, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=16, help="rows of a step")
    parser.add_argument("--numbers", type=int, default=100_000_000, help="of the update that is timed")
    options = parser.parse_args()
    import torch
    from transformers import LlamaConfig

    from tests.fixtures import write_rows

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.hidden,
            intermediate_size=options.hidden * 11 // 4,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 64,
            num_key_value_heads=max(options.hidden // 256, 1),
            architectures=["LlamaForCausalLM"],
        ).save_pretrained(folder / "model")
        count = options.steps * options.accumulation
        ids = np.random.default_rng(0).integers(0, options.vocabulary, (count, options.length + 1)).tolist()
        write_rows(folder / "data", [{"input_ids": row} for row in ids])
        host, device = (train(folder, options, offloads=offloads) for offloads in (True, False))
    found = {
        "benchmark": "offload_optimizer",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": torch.get_num_threads(),
        "offloaded": host,
        "on the device": device,
        "memory_ratio": round(host["memory_mib"] / device["memory_mib"], 3),
        "speed_ratio": round(host["tokens_per_second"] / device["tokens_per_second"], 3),
        "update_seconds": {kind: seconds_of_update(kind, options.numbers) for kind in ("torch", "deepspeed")},
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
