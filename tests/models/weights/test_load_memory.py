"""A process that loads or makes a stage needs little more memory than the stage's weights, and never the whole model.

`benchmarks/load_memory.py` measures the same on a model of 1.2 B parameters.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import functools, json, sys, threading, time
import torch
from transformers import LlamaConfig
from benchmarks.load_memory import memory_bytes
from jllm.models.pipeline.span import spans_of
from jllm.models.tensor_parallel.slicing import slice_stage
from jllm.models.weights.loading import init_stage, load_stage
from jllm.models.weights.saving import save_stage, write_companions, write_index
from jllm.parallel.tensor.group import TensorGroup

torch.set_num_threads(1)
folder, results = sys.argv[1], []
config = LlamaConfig(vocab_size=4000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6)
spans = spans_of([0, 3, 6])

def grown(make):
    before, peak, done = memory_bytes()[0], 0, threading.Event()
    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, memory_bytes()[0])
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = make()
    peak = max(peak, memory_bytes()[0])
    done.set()
    watcher.join()
    own = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return model, (peak - before) / own

small = LlamaConfig(num_hidden_layers=1, hidden_size=64, intermediate_size=64, num_attention_heads=4)
init_stage(small, spans_of([0, 1])[0], dtype=torch.bfloat16, seed=0)  # imports what it needs
if sys.argv[2] == "made":
    for span in spans:
        model, ratio = grown(lambda: init_stage(config, span, dtype=torch.bfloat16, seed=0))
        results.append(ratio)
        save_stage(model, span, folder)
    write_companions(model, folder, dtype=torch.bfloat16)
    write_index(folder)
    del model
cut = None
if sys.argv[2] == "sliced":
    cut = functools.partial(slice_stage, group=TensorGroup(rank=1, size=4, handle=None))
for span in spans:
    model, ratio = grown(lambda: load_stage(folder, span, dtype=torch.bfloat16, cut=cut))
    results.append(ratio)
    del model
print(json.dumps(results))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process's memory")
def test_memory_of_a_stage(tmp_path: Path) -> None:
    """55 M parameters a stage: what is measured beside its weights is not lost in what a process needs anyway."""
    made = run(tmp_path, "made")
    assert len(made) == 4
    assert max(made) <= 1.3, made
    sliced = run(tmp_path, "sliced")
    assert len(sliced) == 2
    assert max(sliced) <= 1.3, sliced
    for path in tmp_path.glob("*.safetensors"):
        wide = {name: tensor.float() for name, tensor in load_file(path).items()}
        save_file(wide, path, metadata={"format": "pt"})
    converted = run(tmp_path, "converted")
    assert len(converted) == 2
    assert max(converted) <= 1.3, converted


def run(folder: Path, how: str) -> list[float]:
    command = [sys.executable, "-c", SCRIPT, str(folder), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    ratios: list[float] = json.loads(done.stdout.splitlines()[-1])
    return ratios
