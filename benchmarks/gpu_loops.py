"""The plain loops that `gpu_train.py` compares with: what a reader of transformers' pages would write, tuned.

transformers' model with Liger's fused linear cross-entropy, every decoder layer compiled, cuDNN's attention first, and
torch's fused AdamW, clipping at 1.0. `fp32` states: bf16 weights, an fp32 copy that the optimizer updates, and fp32
sums of the gradients, without autocast. Prints one JSON line for the loop that it is asked for.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_rows import LORA_RANK, RATE, SETTINGS, WARM_UP, Setting, documents, llama  # noqa: E402

MicroBatch = tuple[Tensor, Tensor]
"""Ids and labels, [B, S] each."""


class WithMasters:
    """AdamW on fp32 copies of bf16 parameters, with their gradients summed in fp32."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self.masters = [nn.Parameter(each.detach().float()) for each in parameters]
        for parameter, master in zip(parameters, self.masters, strict=True):
            master.grad = torch.zeros_like(master)
            parameter.register_post_accumulate_grad_hook(_into(master))
        self._optimizer = torch.optim.AdamW(self.masters, lr=RATE, fused=True)

    def step(self) -> None:
        """One update, and the new weights in bf16."""
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_([*self._parameters], [*self.masters])

    def zero_grad(self) -> None:
        """Empty the sums."""
        torch._foreach_zero_([each.grad for each in self.masters if each.grad is not None])


def _into(master: nn.Parameter) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        assert master.grad is not None
        assert parameter.grad is not None
        master.grad.add_(parameter.grad)
        parameter.grad = None

    return add


def build(setting: Setting, *, is_liger: bool, is_compiled: bool) -> nn.Module:
    """The model, on the device, with random weights."""
    from transformers import LlamaForCausalLM

    if is_liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(rope=False, rms_norm=False, swiglu=False, fused_linear_cross_entropy=True)
    with torch.device("cuda"):
        model: Any = LlamaForCausalLM._from_config(
            llama(setting.shape), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    if setting.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if setting.lora:
        from peft import LoraConfig, get_peft_model

        if setting.recompute:
            model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules="all-linear"))
    if is_compiled:
        for layer in model.get_decoder().layers if not setting.lora else model.base_model.model.model.layers:
            layer.compile()
    return model.train()  # type: ignore[no-any-return]


def micro_batches(setting: Setting) -> Iterator[MicroBatch]:
    """Random ids; where the setting has documents, as many as fit, each padded to the longest of its micro-batch."""
    if setting.mean_document is None:
        while True:
            ids = torch.randint(0, setting.vocabulary, (setting.rows, setting.length), device="cuda")
            yield ids, ids
    lengths = iter(documents(np.random.default_rng(0), 4096 * setting.length, setting.mean_document))
    held = [next(lengths)]
    for length in lengths:
        # As many documents as fit the tokens of a micro-batch when each is padded to the longest.
        if (len(held) + 1) * max(*held, length) <= setting.rows * setting.length:
            held.append(length)
            continue
        longest = max(held)
        ids = torch.randint(0, setting.vocabulary, (len(held), longest), device="cuda")
        places = torch.arange(longest, device="cuda")
        labels = torch.where(places < torch.tensor(held, device="cuda")[:, None], ids, -100)
        yield ids, labels
        held = [length]


def run(setting: Setting, *, steps: int, is_liger: bool, is_compiled: bool) -> dict[str, Any]:
    """Median tokens per second of the steps after warm-up, padding apart, and peak memory in GiB."""
    started = time.perf_counter()
    model = build(setting, is_liger=is_liger, is_compiled=is_compiled)
    trained = [each for each in model.parameters() if each.requires_grad]
    masters = WithMasters(trained) if setting.states == "fp32" and not setting.lora else None
    optimizer: Any = masters or torch.optim.AdamW(trained, lr=RATE, fused=True)
    batches = micro_batches(setting)
    speeds, first = [], 0.0
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        for step in range(steps):
            begun, tokens = time.perf_counter(), 0
            for _ in range(setting.accumulation):
                ids, labels = next(batches)
                tokens += int((labels != -100).sum()) if setting.mean_document is not None else labels.numel()
                (model(input_ids=ids, labels=labels, use_cache=False).loss / setting.accumulation).backward()
            torch.nn.utils.clip_grad_norm_(masters.masters if masters else trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            speeds.append(tokens / (time.perf_counter() - begun))
            if step == 0:
                first = time.perf_counter() - started
    kept = speeds[WARM_UP:]
    return {
        "tokens_per_second": round(statistics.median(kept)),
        "spread": round((max(kept) - min(kept)) / statistics.median(kept), 3),
        "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "first_step_s": round(first, 1),
    }


def main() -> None:
    """Run one loop, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--no_liger", action="store_true")
    parser.add_argument("--no_compile", action="store_true")
    options = parser.parse_args()
    found = run(
        SETTINGS[options.setting],
        steps=options.steps,
        is_liger=not options.no_liger,
        is_compiled=not options.no_compile,
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
