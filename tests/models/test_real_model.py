"""SmolLM2-135M in two stages: the loss on a real chat is transformers' own."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models.chain import load_chain, token_loss

torch.set_num_threads(1)
CHAT = [
    {"role": "user", "content": "What does a pipeline do in a factory?"},
    {"role": "assistant", "content": "It passes work from one station to the next, so that all of them are busy."},
    {"role": "user", "content": "And when one station is slow?"},
    {"role": "assistant", "content": "Then the others wait for it, and the slowest one sets the pace."},
]


def test_two_stages_of_a_real_model(real_model: Path) -> None:
    ids = AutoTokenizer.from_pretrained(real_model).apply_chat_template(CHAT, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    labels = torch.roll(ids, -1, dims=1)
    labels[:, -1] = -100
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32).train()
        expected = token_loss(whole(input_ids=ids, use_cache=False).logits, labels)
        first, last = load_chain(real_model, [0, 16, 30])
        integers = torch.stack([labels, torch.arange(ids.shape[1])[None]])
        found = last(first((ids, integers)))
    assert expected < 4  # a model that knows the language
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
