"""QLoRA of an 8B Llama on one device: memory and speed of the trainer beside transformers, peft and bitsandbytes.

The model has random weights in NF4 with double quantisation, in a folder as transformers saves it (5.6 GB, removed
afterwards); layers of the same kind hold the same bytes, so that little is drawn and nothing large is held. Both train
the same adapters in fp32, on all linear maps, beside a bf16 model, on random tokens, each in a process of its own; the
peer is the loop that people write first, with SDPA and torch's fused AdamW. Prints one JSON line: peak memory of the
device's allocator, and median tokens per second after warm-up. With --hidden 256 it is tried on CPU, without memory.
"""

import argparse
import json
import shutil
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
RANK, WARM_UP, RATE = 16, 2, 1e-4


def llama(options: argparse.Namespace) -> Any:
    """The configuration: an 8B Llama for a hidden size of 4096."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 7 // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 128,
        num_key_value_heads=max(options.hidden // 512, 1),
        head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def make_model(folder: Path, options: argparse.Namespace) -> None:
    """Write the folder, a layer at a time."""
    import torch
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file
    from transformers import BitsAndBytesConfig

    config, device = llama(options), "cuda" if torch.cuda.is_available() else "cpu"
    hidden, inner, wide = options.hidden, config.intermediate_size, config.num_key_value_heads * 128
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {"self_attn.k_proj": (wide, hidden), "self_attn.v_proj": (wide, hidden)}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    norms = ("input_layernorm", "post_attention_layernorm")
    layer = {f"{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in norms}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02
        packed, state = quantize_4bit(drawn, compress_statistics=True, quant_type="nf4")
        layer[f"{name}.weight"] = packed.cpu()
        layer |= {f"{name}.weight.{key}": value.cpu() for key, value in state.as_dict(packed=True).items()}
    folder.mkdir()
    places: dict[str, str] = {}
    for index in range(options.layers):
        tensors = {f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()}
        save_file(tensors, folder / f"layer-{index:03d}.safetensors", {"format": "pt"})
        places |= dict.fromkeys(tensors, f"layer-{index:03d}.safetensors")
    ends = {
        name: torch.randn(options.vocabulary, hidden, dtype=torch.bfloat16) * 0.02
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    ends["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    save_file(ends, folder / "ends.safetensors", {"format": "pt"})
    places |= dict.fromkeys(ends, "ends.safetensors")
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def run_ours(folder: Path, options: argparse.Namespace) -> dict[str, float | None]:
    """The trainer, started as people start it."""
    from tests.fixtures import write_rows

    rows = options.steps * options.accumulation
    ids = np.random.default_rng(0).integers(0, options.vocabulary, (rows, options.length + 1)).tolist()
    write_rows(folder / "data", [{"input_ids": row} for row in ids])
    command = [sys.executable, "-m", "jllm", "train", "--processes", "1", "-m", str(folder / "model")]
    command += ["--train_data", str(folder / "data"), "--seq_len", str(options.length), "--lora_dim", str(RANK)]
    command += ["--gradient_accumulation_steps", str(options.accumulation), "--max_steps", str(options.steps)]
    command += ["--learning_rate", str(RATE), "--log_dir", str(folder / "log")]
    command += ["--checkpoint_grad_interval", "1"] if options.recompute else []
    command += ["--profile_step", str(options.steps)] if options.profile is not None else []
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    if options.profile is not None:
        options.profile.mkdir(parents=True, exist_ok=True)
        for path in (folder / "log").glob("profile*.txt"):
            shutil.copy(path, options.profile / f"qlora-8b-{path.name}")
    lines = (folder / "log/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record][WARM_UP:]
    return {
        "tokens_per_second": round(statistics.median(record["tokens_per_second"] for record in records), 1),
        "memory_mib": max(max(record["memory_mib"]) for record in records),
    }


def run_peer(folder: Path, options: argparse.Namespace) -> dict[str, float | None]:
    """The plain loop, in this process."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    is_cuda = torch.cuda.is_available()
    device = "cuda" if is_cuda else "cpu"
    base = AutoModelForCausalLM.from_pretrained(
        folder / "model",
        dtype=torch.bfloat16,
        device_map={"": device},
        attn_implementation="sdpa",
        trust_remote_code=False,
    )
    if options.recompute:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=is_cuda)
    speeds = []
    for _ in range(options.steps):
        started = time.perf_counter()
        for _ in range(options.accumulation):
            ids = torch.randint(0, options.vocabulary, (1, options.length), device=device)
            (model(input_ids=ids, labels=ids, use_cache=False).loss / options.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if is_cuda:
            torch.cuda.synchronize()
        speeds.append(options.accumulation * options.length / (time.perf_counter() - started))
    peak = torch.cuda.max_memory_allocated() / 2**20 if is_cuda else None
    return {"tokens_per_second": round(statistics.median(speeds[WARM_UP:]), 1), "memory_mib": peak}


def main() -> int:
    """Make, run both, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size, a multiple of 128")
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=4, help="rows of a step, one at a time")
    parser.add_argument("--recompute", action="store_true", help="recompute the activations of every layer, in both")
    parser.add_argument("--profile", type=Path, help="folder for the kernels of a step of ours")
    parser.add_argument("--no_peer", action="store_true")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer is not None:
        print(json.dumps(run_peer(options.peer, options)))
        return 0
    import torch

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", options)
        ours = run_ours(folder, options)
        peer = None
        if not options.no_peer:
            command = [sys.executable, __file__, *sys.argv[1:], "--peer", str(folder)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            peer = json.loads(done.stdout.splitlines()[-1])
    found = {
        "benchmark": "qlora_8b",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "layers": options.layers,
        "length": options.length,
        "recompute": options.recompute,
        "jllm": ours,
        "peer": peer,
    }
    if peer is not None:
        found["ratio"] = round(float(ours["tokens_per_second"] or 0) / peer["tokens_per_second"], 3)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
