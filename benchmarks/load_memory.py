"""Loading a stage: how much private memory a process needs at its peak, over the stage's own weights.

Makes a random Llama of 1.24 B parameters (bf16, 2.5 GB on disk, removed afterwards), then loads its two stages in two
processes at the same time, on CPU. Private memory is what a process does not share with anyone: anonymous memory,
sampled every 5 ms from the kernel's account of the process, over what it had after imports. Mapped file pages are the
page cache, which all processes of a node share; they are reported beside it. Prints one JSON line; the bar is 1.3.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def memory_bytes() -> tuple[int, int]:
    """(anonymous, resident) bytes of this process."""
    anonymous = resident = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            anonymous = int(line.split()[1]) * 1024
        elif line.startswith("VmRSS:"):
            resident = int(line.split()[1]) * 1024
    return anonymous, resident


def load(folder: str, index: int) -> dict[str, float]:
    """Load one stage in this process and watch the memory."""
    import torch

    from jllm.models.pipeline.span import StageSpan
    from jllm.models.pipeline.structure import count_layers
    from jllm.models.weights.loading import load_stage
    from jllm.models.weights.source import read_config

    torch.set_num_threads(1)
    layers = count_layers(read_config(folder))
    middle = layers // 2
    span = StageSpan(index=index, count=2, first_layer=[0, middle][index], end_layer=[middle, layers][index])
    anonymous, resident = memory_bytes()
    peaks = [anonymous, resident]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peaks[:] = [max(old, new) for old, new in zip(peaks, memory_bytes(), strict=True)]

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = load_stage(folder, span, dtype=torch.bfloat16)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    peaks[:] = [max(old, new) for old, new in zip(peaks, memory_bytes(), strict=True)]
    own = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {
        "own_weights": own,
        "private_peak": peaks[0] - anonymous,
        "resident_peak": peaks[1] - resident,
        "ratio": round((peaks[0] - anonymous) / own, 3),
        "seconds": round(seconds, 2),
    }


def make(folder: str, layers: int) -> None:
    """Write the random model, one stage at a time."""
    import torch
    from transformers import LlamaConfig

    from jllm.models.pipeline.partition import partition
    from jllm.models.pipeline.span import spans_of
    from jllm.models.weights.loading import init_stage
    from jllm.models.weights.saving import save_stage, write_companions, write_index

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    for span in spans_of(partition("uniform", config=config, num_stages=4)):
        model = init_stage(config, span, dtype=torch.bfloat16, seed=0)
        save_stage(model, span, folder)
    write_companions(model, folder, dtype=torch.bfloat16)
    write_index(folder)


def main() -> int:
    """Make, load twice at once, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=18, help="decoder layers of 61 M parameters each")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.make, arguments.layers)
        return 0
    if arguments.load:
        print(json.dumps(load(arguments.load, arguments.stage)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__]
        subprocess.run([*command, "--make", folder, "--layers", str(arguments.layers)], check=True)
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, "--load", folder, "--stage", str(index)], stdout=subprocess.PIPE
            )
            for index in range(2)
        ]
        outputs = [worker.communicate()[0] for worker in workers]
    stages = [json.loads(output.splitlines()[-1]) for output in outputs]
    ratio = max(stage["ratio"] for stage in stages)
    print(json.dumps({"benchmark": "load_memory", "ratio": ratio, "bar": 1.3, "stages": stages}))
    return 0 if ratio <= 1.3 else 1


if __name__ == "__main__":
    sys.exit(main())
