"""Training speed on one GPU: the trainer through DeepSpeed's pipeline engine against a plain transformers loop.

The model has the width of an 8B Llama and few layers, random weights, sequence 4,096, bf16. Ours keeps fp32 master
weights and sums gradients in fp32; the peer is the loop that people write first: bf16 weights, SDPA, torch's AdamW on
bf16. Prints one JSON line: median tokens per second of both after warm-up, their ratio, and our model FLOPs
utilisation; "skipped" without a CUDA device.
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
import pyarrow as pa

from jllm.data.dataset.manifest import Manifest, entry_of_written, write_manifest
from jllm.data.dataset.shards import INPUT_IDS, ShardWriter, schema, to_list_array

VOCABULARY, LENGTH, WARM_UP = 32_000, 4096, 3
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--accumulation", type=int, default=4)
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print(json.dumps({"benchmark": "train_step", "skipped": "no CUDA device"}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        ours, utilisation = run_ours(Path(scratch), options)
    peer = run_peer(options)
    print(
        json.dumps(
            {
                "benchmark": "train_step",
                "device": torch.cuda.get_device_name(),
                "layers": options.layers,
                "tokens_per_second": round(ours),
                "peer_tokens_per_second": round(peer),
                "ratio": round(ours / peer, 3),
                "mfu": utilisation,
            }
        )
    )


def run_ours(folder: Path, options: argparse.Namespace) -> tuple[float, float | None]:
    """Median tokens per second and utilisation of the trainer, started through the launcher."""
    from transformers import LlamaConfig

    LlamaConfig(**SHAPE, num_hidden_layers=options.layers, dtype="bfloat16").save_pretrained(folder / "model")
    rows = options.steps * options.accumulation
    values = np.random.default_rng(0).integers(0, VOCABULARY, rows * (LENGTH + 1)).astype(np.int32)
    offsets = np.arange(0, len(values) + 1, LENGTH + 1, dtype=np.int64)
    path = folder / "data/set-00000/set-00000-00000.zstd.parquet"
    with ShardWriter(path, columns=[INPUT_IDS]) as writer:
        writer.write(pa.RecordBatch.from_arrays([to_list_array(values, offsets)], schema=schema([INPUT_IDS])))
    entry = entry_of_written(path, folder / "data", writer.statistics)
    write_manifest(folder / "data", Manifest(command="benchmark", options={}, files=(entry,)))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--module", "jllm.train_pipe"]
    command += [
        "--model",
        str(folder / "model"),
        "--init",
        "--train_data",
        str(folder / "data"),
        "--seq_len",
        str(LENGTH),
    ]
    command += ["--gradient_accumulation_steps", str(options.accumulation), "--max_steps", str(options.steps)]
    command += ["--log_dir", str(folder / "log")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (folder / "log/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record][WARM_UP:]
    speed = statistics.median(record["tokens_per_second"] for record in records)
    return speed, statistics.median(record["mfu"] for record in records) if records[0]["mfu"] else None


def run_peer(options: argparse.Namespace) -> float:
    """Median tokens per second of the plain loop."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPE, num_hidden_layers=options.layers)
    with torch.device("cuda"):
        model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    speeds = []
    for _ in range(options.steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(options.accumulation):
            ids = torch.randint(0, VOCABULARY, (1, LENGTH), device="cuda")
            (model(input_ids=ids, labels=ids, use_cache=False).loss / options.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        speeds.append(options.accumulation * LENGTH / (time.perf_counter() - started))
    return float(statistics.median(speeds[WARM_UP:]))


if __name__ == "__main__":
    main()
