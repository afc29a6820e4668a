"""SmolLM2-135M in two stages: the loss on a real chat is transformers' own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models.chain import load_chain, token_loss

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
CHAT = [
    {"role": "user", "content": "What does a pipeline do in a factory?"},
    {"role": "assistant", "content": "It passes work from one station to the next, so that all of them are busy."},
    {"role": "user", "content": "And when one station is slow?"},
    {"role": "assistant", "content": "Then the others wait for it, and the slowest one sets the pace."},
]


def test_two_stages_of_a_real_model(tmp_path: Path) -> None:
    assets = Path(os.environ.get("JLLM_ASSETS") or Path.home() / ".cache" / "jllm-assets")
    gguf = assets / "gguf" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not gguf.is_file():
        pytest.skip(f"{gguf} is not there; bring it with: make assets")
    folder = tmp_path / "model"
    command = [sys.executable, ROOT / "tools" / "gguf2hf.py", "-i", gguf, "-o", folder]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    labels = torch.roll(ids, -1, dims=1)
    labels[:, -1] = -100
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        expected = token_loss(whole(input_ids=ids, use_cache=False).logits, labels)
        first, last = load_chain(folder, [0, 16, 30])
        integers = torch.stack([labels, torch.arange(ids.shape[1])[None]])
        found = last(first((ids, integers)))
    assert expected < 4  # a model that knows the language
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
