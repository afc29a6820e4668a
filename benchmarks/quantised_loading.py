"""Loading a model in 4 bits: how much memory a process needs at its peak, over the bytes that it then holds.

Makes a random Llama (bf16, removed afterwards), and the folder that transformers and bitsandbytes save of it in NF4
with double quantisation. Each of the two is loaded by jllm and by transformers alone, on CPU, each time in a fresh
process that has loaded a small model before. Memory is sampled every 2 ms from the kernel's account of the process: all
that is resident, mapped pages of the files included, and anonymous memory alone. What a process holds is its weights
with their scales. `jllm sliced` is one of two processes that share the stage (`--model_parallel_size 2`). Prints one
JSON line; the bar is 1.3 for jllm, of all that is resident.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BAR = 1.3
BF16, STORED = "bf16", "stored"
SLICED = "jllm sliced"


def make(folder: Path, *, layers: int, hidden: int) -> None:
    """Write a random model in bf16, and in NF4."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8_000,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 256, 1),
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder / BF16)
    by_transformers(folder / BF16, is_stored=False).save_pretrained(folder / STORED)


def by_transformers(folder: Path, *, is_stored: bool) -> Any:
    """What transformers and bitsandbytes load of a folder."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    given = {} if is_stored else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **given)


def by_jllm(folder: Path, *, is_stored: bool, slices: int = 1) -> Any:
    """What jllm loads of it, as one stage, or as one of its slices."""
    import torch

    from jllm.models.pipeline.span import spans_of
    from jllm.models.pipeline.structure import count_layers
    from jllm.models.tensor_parallel.slicing import slice_stage
    from jllm.models.weights.loading import load_stage
    from jllm.models.weights.quantisation import Quantisation, plan_quantisation, stored_quantisation
    from jllm.models.weights.source import causal_class, read_config
    from jllm.parallel.tensor.group import TensorGroup

    config = read_config(folder, quantised=True)
    how = stored_quantisation(folder) or Quantisation(bits=4)
    assert how.is_stored == is_stored
    plan = plan_quantisation(config, causal_class(config), how, folder=folder)
    [span] = spans_of([0, count_layers(config)])
    cut = None
    if slices > 1:
        cut = functools.partial(slice_stage, group=TensorGroup(rank=slices - 1, size=slices, handle=None))
    return load_stage(folder, span, dtype=torch.bfloat16, quantisation=plan, cut=cut)


def load(folder: Path, small: Path, who: str) -> dict[str, float]:
    """Load one folder in this process and watch the memory."""
    import torch

    from benchmarks.load_memory import memory_bytes
    from jllm.models.weights.quantising import held_bytes

    torch.set_num_threads(1)
    loading: Callable[..., Any] = by_transformers if who == "transformers" else by_jllm
    if who == SLICED:
        loading = functools.partial(by_jllm, slices=2)
    is_stored = folder.name == STORED
    loading(small, is_stored=is_stored)
    before = memory_bytes()
    peaks = list(before)
    done = threading.Event()

    def look() -> None:
        peaks[:] = [max(old, new) for old, new in zip(peaks, memory_bytes(), strict=True)]

    def watch() -> None:
        while not done.wait(0.002):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = loading(folder, is_stored=is_stored)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    look()
    own = held_bytes(model)
    return {
        "held_mib": round(own / 2**20, 1),
        "ratio": round((peaks[1] - before[1]) / own, 3),
        "anonymous_ratio": round((peaks[0] - before[0]) / own, 3),
        "seconds": round(seconds, 2),
    }


def main() -> int:
    """Make, load four times, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="decoder layers")
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size, a multiple of 512")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--small", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--who", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(given.make, layers=given.layers, hidden=given.hidden)
        return 0
    if given.load:
        print(json.dumps(load(given.load, given.small, given.who)))
        return 0
    found: dict[str, Any] = {"benchmark": "quantised_loading", "layers": given.layers, "hidden": given.hidden}
    with tempfile.TemporaryDirectory() as name:
        folder, small = Path(name) / "model", Path(name) / "small"
        sizes = ["--layers", str(given.layers), "--hidden", str(given.hidden)]
        subprocess.run([sys.executable, __file__, "--make", folder, *sizes], check=True, stderr=subprocess.DEVNULL)
        least = ["--layers", "2", "--hidden", "512"]  # slices have whole blocks
        subprocess.run([sys.executable, __file__, "--make", small, *least], check=True, stderr=subprocess.DEVNULL)
        for kind in (BF16, STORED):
            for who in ("jllm", SLICED, "transformers"):
                places = ["--load", str(folder / kind), "--small", str(small / kind)]
                command = [sys.executable, __file__, *places, "--who", who]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                found[f"{who} {kind}"] = json.loads(done.stdout.splitlines()[-1])
    worst = max(found[f"{who} {kind}"]["ratio"] for kind in (BF16, STORED) for who in ("jllm", SLICED))
    print(json.dumps({**found, "ratio": worst, "bar": BAR}))
    return 0 if worst <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
