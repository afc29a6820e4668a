"""Gradients in bf16 of a model in two slices, beside those of one process in bf16: how near each is to fp32.

    python benchmarks/slices_bf16.py                        qwen3 (norms of heads) and llama, on two GPUs over NCCL
    python benchmarks/slices_bf16.py --width 128 --on_cpu   the same over gloo, as a trial

The weights are bf16 numbers everywhere. Of each parameter: the norm of the difference to the fp32 gradient, over that
gradient's norm; of slices together as of the whole, and over several batches, for the rounding of one is chance.
`worst_ratio` is the largest quotient of the two over all parameters, of gradients above a thousandth of the largest;
1.0 is as near as one process. The bar is 1.1. `norms` are the norms of all gradients together: fp32, one process,
slices.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jllm.parallel.ports import free_port  # noqa: E402

SIZE = 2
FAMILIES = ("qwen3", "llama")
Gradients = dict[str, Any]


def write_model(folder: Path, family: str, width: int, layers: int) -> None:
    """Random weights, rounded to bf16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, vocab_size=32_000,
        num_attention_heads=16, num_key_value_heads=4, head_dim=width // 16, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def gradients_of(folder: Path, dtype: Any, length: int, device: str, seed: int, group: Any = None) -> Gradients:
    """Of the mean loss of two rows of random ids: gradient in fp32 and slice by parameter."""
    import torch
    import torch.distributed as dist

    from jllm.models.pipeline.span import spans_of
    from jllm.models.pipeline.stage import PipelineStage
    from jllm.models.pipeline.structure import count_layers
    from jllm.models.tensor_parallel.marks import partial_gradient
    from jllm.models.tensor_parallel.slicing import slice_stage
    from jllm.models.weights.loading import load_stage
    from jllm.models.weights.source import read_config
    from jllm.parallel.tensor.slices import slice_of
    from jllm.train.objectives.cross_entropy import CrossEntropy
    from jllm.train.objectives.objective import ObjectiveInUse

    [span] = spans_of([0, count_layers(read_config(folder))])
    model = load_stage(folder, span, dtype=dtype)
    if group is not None:
        slice_stage(model, group)
    model.to(device)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 32_000, (2, length + 1), generator=generator).to(device)
    places = torch.arange(length, device=device).repeat(2, 1)
    objective = ObjectiveInUse(CrossEntropy())
    objective.use(CrossEntropy(), scale=1 / ids[:, 1:].numel())
    loss = PipelineStage(model, span, objective)((ids[:, :-1], torch.stack([ids[:, 1:], places])))
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if (handle := partial_gradient(parameter)) is not None:
            dist.all_reduce(parameter.grad, group=handle)
        found[name] = (parameter.grad.float(), slice_of(parameter))
    return found


def compared(rank: int, port: int, folder: str, length: int, batches: int, on_cpu: bool, answer: str) -> None:
    """One of the two processes."""
    import torch
    import torch.distributed as dist

    from jllm.parallel.mesh import Mesh
    from jllm.parallel.tensor.group import TensorGroup

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(SIZE))
    device = "cpu" if on_cpu else f"cuda:{rank}"
    if not on_cpu:
        torch.cuda.set_device(rank)
    dist.init_process_group("gloo" if on_cpu else "nccl")
    group = TensorGroup.make(Mesh(tensor=SIZE), rank)
    total = torch.zeros(1)
    for seed in range(batches):
        exact = gradients_of(Path(folder), torch.float32, length, device, seed)
        whole = gradients_of(Path(folder), torch.bfloat16, length, device, seed)
        sliced = gradients_of(Path(folder), torch.bfloat16, length, device, seed, group)
        sums = []  # squares by parameter: of fp32, of the whole's difference, of the slices', of both in bf16
        for name, (mine, part) in sliced.items():
            true, one = (each[name][0] if part is None else part.of(each[name][0]) for each in (exact, whole))
            share = 1.0 if part is not None else 1 / SIZE  # what all have alike counts once
            squares = [true, one - true, mine - true, one, mine]
            sums.append(torch.stack([each.double().square().sum() * share for each in squares]))
        total = total.to(device) + torch.stack(sums)
    dist.all_reduce(total)
    if rank == 0:
        norms = total.sqrt()
        counts = norms[:, 0] > 1e-3 * norms[:, 0].max()
        ratios = torch.where(counts, norms[:, 2] / norms[:, 1].clamp(min=1e-30), 0.0)
        worst = int(ratios.argmax())
        of_all = total.sum(0).sqrt().tolist()
        found = {
            "worst_ratio": round(float(ratios[worst]), 3),
            "worst": list(sliced)[worst],
            "median_ratio": round(float(ratios[counts].median()), 3),
            "error_one": round(of_all[1] / of_all[0], 5),
            "error_slices": round(of_all[2] / of_all[0], 5),
            "norms": [float(f"{of_all[at]:.5g}") for at in (0, 3, 4)],
        }
        Path(answer).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Print a line a family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batches", type=int, default=8, help="over which squares are summed")
    parser.add_argument("--on_cpu", action="store_true", help="over gloo, where there are no two GPUs")
    options = parser.parse_args()
    import torch
    from torch import multiprocessing

    for family in options.families:
        said: dict[str, Any] = {"benchmark": "slices_bf16", "family": family}
        if torch.cuda.device_count() < SIZE and not options.on_cpu:
            print(json.dumps({**said, "skipped": "no two CUDA devices"}))
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder) / "model", family, options.width, options.layers)
            answer = Path(folder) / "answer.json"
            given = (
                free_port(),
                str(Path(folder) / "model"),
                options.length,
                options.batches,
                options.on_cpu,
                str(answer),
            )
            multiprocessing.spawn(compared, given, nprocs=SIZE)  # type: ignore[attr-defined,no-untyped-call]
            device = "cpu" if options.on_cpu else torch.cuda.get_device_name()
            print(json.dumps({**said, "device": device, **json.loads(answer.read_text(encoding="utf-8"))}), flush=True)


if __name__ == "__main__":
    main()
