"""The plain loops that `gpu_train.py` compares with: what a reader of transformers' pages would write, tuned.

transformers' model with Liger's fused linear cross-entropy, every decoder layer compiled, cuDNN's attention first, and
torch's fused AdamW, clipping at 1.0. `fp32` states: bf16 weights, an fp32 copy that the optimizer updates, and fp32
sums of the gradients, without autocast. Prints one JSON line for the loop that it is asked for.

The loop of preference pairs is written like TRL's: chosen and rejected sides one batch, padded to the longest one, all
logits there, log-probabilities row by row; neither compiled nor with Liger, as is TRL's default. Its references are
given, as ours are.
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

from benchmarks.gpu_rows import LORA_RANK, RATE, SETTINGS, WARM_UP, Setting, documents, llama, pair_lengths  # noqa: E402

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


PAIRS_AT_ONCE = 4
"""Pairs of a micro-batch of the padded loop."""


def pair_batches(setting: Setting, device: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ids, attention mask and the mask of answers [2 x pairs, S]: chosen sides first, padded to the longest."""
    assert setting.mean_document is not None
    generator = np.random.default_rng(0)
    while True:
        lengths = [pair_lengths(generator, setting.mean_document, setting.length) for _ in range(PAIRS_AT_ONCE)]
        sides = torch.tensor([each.sides[which] for which in (0, 1) for each in lengths], device=device)
        prompts = torch.tensor([each.prompt for _ in (0, 1) for each in lengths], device=device)
        longest = int(sides.max())
        ids = torch.randint(0, setting.vocabulary, (len(sides), longest), device=device)
        places = torch.arange(longest, device=device)
        there = places < sides[:, None]
        yield ids, there.long(), there & (places >= prompts[:, None])


def dpo_loss(model: nn.Module, ids: Tensor, there: Tensor, answers: Tensor, beta: float = 0.1) -> Tensor:
    """The mean over pairs; the references are given numbers."""
    logits = model(input_ids=ids, attention_mask=there, use_cache=False).logits[:, :-1]
    targets = ids[:, 1:]
    # Row by row, as TRL does in bf16, for which the stable way needs all of log-softmax.
    rows = [row.log_softmax(-1).gather(-1, labels[:, None])[:, 0] for row, labels in zip(logits, targets, strict=True)]
    sums = (torch.stack(rows) * answers[:, 1:]).sum(-1)
    chosen, rejected = (sums - sums.detach()).chunk(2)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()


def run_pairs(setting: Setting, *, steps: int, device: str) -> dict[str, Any]:
    """As `run`, of the padded loop over preference pairs; tokens are those of both sides, padding apart."""
    from transformers import LlamaForCausalLM

    started = time.perf_counter()
    with torch.device(device):
        model: Any = LlamaForCausalLM._from_config(
            llama(setting.shape), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    trained = [*model.train().parameters()]
    optimizer = WithMasters(trained)
    batches = pair_batches(setting, device)
    speeds, first = [], 0.0
    # As many pairs a step as fill the rows of ours.
    count = max(1, setting.rows * setting.length * setting.accumulation // (2 * setting.mean_document * PAIRS_AT_ONCE))  # type: ignore[operator]
    for step in range(steps):
        begun, tokens = time.perf_counter(), 0
        for _ in range(count):
            ids, there, answers = next(batches)
            tokens += int(there.sum())
            (dpo_loss(model, ids, there, answers) / count).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(optimizer.masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        speeds.append(tokens / (time.perf_counter() - begun))
        if step == 0:
            first = time.perf_counter() - started
    kept = speeds[WARM_UP:]
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "tokens_per_second": round(statistics.median(kept)),
        "spread": round((max(kept) - min(kept)) / statistics.median(kept), 3),
        "memory_gib": round(memory / 2**30, 1),
        "first_step_s": round(first, 1),
    }


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
    if SETTINGS[options.setting].pairs:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        print(json.dumps(run_pairs(SETTINGS[options.setting], steps=options.steps, device=device)))
        return
    found = run(
        SETTINGS[options.setting],
        steps=options.steps,
        is_liger=not options.no_liger,
        is_compiled=not options.no_compile,
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
