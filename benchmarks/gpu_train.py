"""Training speed on GPUs: the trainer, started as people start it, beside the plain loops of `gpu_loops.py`, in turn.

    python benchmarks/gpu_train.py wide-kahan wide-masters
    python benchmarks/gpu_train.py 1b-kahan --rounds 2 --ours "--compile off"
    python benchmarks/gpu_train.py wide-fp8
    python benchmarks/gpu_train.py two-stages two-slices two-runs    the same on two devices, in three ways

Random weights and random tokens, bf16, 4,096 tokens a row, clipping at 1.0; `gpu_rows.py` has the settings. One JSON
line a setting: tokens per second (median after warm-up), model FLOPs utilisation (of 989 TFLOP/s; `flops_per_token`),
peak memory of the device's allocator and seconds to the first step of each, and their ratio; and what a product of
8192 x 8192 x 8192 reaches on the card. The peer of fp8 is ours in bf16. With --profile FOLDER the kernels that take
most of a step of ours go there, as text. "skipped" without CUDA devices enough.

`dpo` trains packed preference pairs, with references that the trainer writes before, beside plain packed training of
the same shape (`packed`) and a padded loop written like TRL's. Where documents are packed, the utilisation is of what
is computed: attention inside documents, the head where tokens are trained on, nothing twice.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_rows import (  # noqa: E402
    LORA_RANK,
    RATE,
    SETTINGS,
    WARM_UP,
    Setting,
    attended_length,
    flops_per_token,
    llama,
    write_data,
    write_pairs,
)

PEAK = 989e12


def run_ours(
    name: str, setting: Setting, *, steps: int, further: list[str], scratch: Path, profile: Path | None = None
) -> dict[str, Any]:
    """Median tokens per second of the steps after warm-up, padding apart, and peak memory of the fullest device."""
    steps += profile is not None  # one more, which is profiled and does not count
    write = write_pairs if setting.pairs else write_data
    write(scratch / "data", setting, rows=steps * setting.accumulation * setting.rows)
    command = [sys.executable, "-m", "jllm", "train", "--processes", str(setting.devices)]
    if setting.has_weights:
        write_weights(scratch / "model", setting)
    else:
        llama(setting.shape).save_pretrained(scratch / "model")
    command += ["-m", str(scratch / "model"), "--train_data", str(scratch / ("ref" if setting.pairs else "data"))]
    command += [] if setting.has_weights else ["--init"]
    command += ["--loss", "dpo"] if setting.pairs else []
    references = write_references(scratch, setting, further) if setting.pairs else 0.0
    command += ["--pipe_parallel_size", str(setting.stages), "--seq_len", str(setting.length)]
    command += ["--model_parallel_size", str(setting.slices)] if setting.slices > 1 else []
    command += ["--sequence_parallel_size", str(setting.runs)] if setting.runs > 1 else []
    command += ["--micro_batch_size", str(setting.rows), "--learning_rate", str(RATE)]
    command += ["--gradient_accumulation_steps", str(setting.accumulation), "--max_steps", str(steps)]
    command += ["--log_dir", str(scratch / "log")]
    command += ["--optimizer", "adamw_kahan"] if setting.states == "bf16" else []
    command += ["--block_mask"] if setting.mean_document is not None and not setting.pairs else []
    command += ["--lora_dim", str(LORA_RANK)] if setting.lora else []
    command += ["--checkpoint_grad_interval", "1"] if setting.recompute else []
    command += ["--fp8", setting.fp8] if setting.fp8 is not None else []
    command += ["--profile_step", str(steps)] if profile is not None else []
    started = time.time()
    done = subprocess.run([*command, *setting.further, *further], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    lines = (scratch / "log/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    kept = [record["tokens_per_second"] for record in records[WARM_UP : len(records) - (profile is not None)]]
    # The records have seconds of each step; what came before the first is the start and the compiling.
    took = time.time() - started - sum(record["seconds"] for record in records[1:])
    if profile is not None:
        profile.mkdir(parents=True, exist_ok=True)
        for path in (scratch / "log").glob("profile*.txt"):
            shutil.copy(path, profile / f"{name}-{path.name}")
    found: dict[str, Any] = {
        "tokens_per_second": round(statistics.median(kept)),
        "spread": round((max(kept) - min(kept)) / statistics.median(kept), 3),
        "memory_gib": round(max(max(record["memory_mib"]) for record in records) / 1024, 1),
        "first_step_s": round(took, 1),
    }
    attended = float(setting.length)
    if setting.mean_document is not None:
        found["head_share"] = round(statistics.median(each["trained_tokens"] / each["tokens"] for each in records), 3)
        attended = attended_length(scratch / "data")
    flops = flops_per_token(setting, attended=attended, share=found.get("head_share", 1.0))
    found["mfu"] = float(f"{statistics.median(kept) * flops / (PEAK * setting.devices):.4g}")
    if setting.pairs:
        last = records[-1]
        found |= {"loss_first": records[0]["loss"], "margin_last": last["rewards/margins"], "references_s": references}
    return found


def write_weights(folder: Path, setting: Setting) -> None:
    """A model folder with random weights."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(llama(setting.shape), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def write_references(scratch: Path, setting: Setting, further: list[str]) -> float:
    """The set with references; seconds of the whole command."""
    command = [sys.executable, "-m", "jllm", "train", "-m", str(scratch / "model")]
    command += ["--train_data", str(scratch / "data"), "--write_ref_logps", str(scratch / "ref")]
    command += ["--micro_batch_size", str(setting.rows), "--seq_len", str(setting.length)]
    started = time.time()
    done = subprocess.run([*command, *further], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return round(time.time() - started, 1)


def run_peer(name: str, setting: Setting, *, steps: int, further: list[str]) -> dict[str, Any]:
    """The plain loop, in a process of its own; with fp8, ours without it."""
    if setting.fp8 is not None:
        with tempfile.TemporaryDirectory() as scratch:
            plain = dataclasses.replace(setting, fp8=None)
            return run_ours(name, plain, steps=steps, further=further, scratch=Path(scratch))
    command = [sys.executable, str(ROOT / "benchmarks/gpu_loops.py"), name, "--steps", str(steps), *further]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:300]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compared(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both, in turn; the better round of each."""
    setting = SETTINGS[name]
    ours: list[dict[str, Any]] = []
    peers: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        if not options.no_peer and setting.devices == 1:
            peers.append(run_peer(name, setting, steps=options.steps, further=options.peer.split()))
        with tempfile.TemporaryDirectory() as scratch:
            ours.append(
                run_ours(
                    name,
                    setting,
                    steps=options.steps,
                    further=options.ours.split(),
                    scratch=Path(scratch),
                    profile=options.profile,
                )
            )
    found: dict[str, Any] = {"benchmark": "gpu_train", "setting": name, "ours": ours[-1]}
    speed = statistics.median(each["tokens_per_second"] for each in ours)
    if setting.pairs:
        # Plain packed training of the same shape, in the same call.
        plain = name.replace("dpo", "packed")
        with tempfile.TemporaryDirectory() as scratch:
            packed = run_ours(
                plain, SETTINGS[plain], steps=options.steps, further=options.ours.split(), scratch=Path(scratch)
            )
        found |= {
            "packed": packed,
            "mfu_ratio_to_packed": round(ours[-1]["mfu"] / packed["mfu"], 3),
            "memory_ratio_to_packed": round(ours[-1]["memory_gib"] / max(packed["memory_gib"], 0.1), 3),
        }
    if peers:
        found["peer"] = peers[-1]
        if "failed" not in peers[-1]:
            peer = statistics.median(each["tokens_per_second"] for each in peers)
            if setting.mean_document is None:
                found["peer_mfu"] = round(ours[-1]["mfu"] * peer / ours[-1]["tokens_per_second"], 4)
            found["ratio"] = round(speed / peer, 3)
            found["memory_ratio"] = round(ours[-1]["memory_gib"] / max(peers[-1]["memory_gib"], 0.1), 3)
    return found


def product_rate() -> float:
    """Operations a second of a bf16 product of 8192 x 8192 x 8192 on random numbers: what cards differ by."""
    import torch

    size = 8192
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(20):
        left @ right
    ended.record()
    torch.cuda.synchronize()
    return float(20 * 2 * size**3 / (begun.elapsed_time(ended) / 1000))


def main() -> None:
    """Measure, and print a line for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", choices=[*SETTINGS, []], help="all but the tiny ones, unless named")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ours", default="", help="further options of our command line")
    parser.add_argument("--peer", default="", help="further options of the loop")
    parser.add_argument("--no_peer", action="store_true")
    parser.add_argument("--on_cpu", action="store_true", help="run the tiny settings where there is no GPU, as a trial")
    parser.add_argument("--profile", type=Path, help="folder for the kernels of a step of ours")
    options = parser.parse_args()
    import torch

    for name in options.settings or [each for each in SETTINGS if not each.startswith("tiny")]:
        if torch.cuda.device_count() < SETTINGS[name].devices and not (options.on_cpu and name.startswith("tiny")):
            print(json.dumps({"benchmark": "gpu_train", "setting": name, "skipped": "no CUDA devices enough"}))
            continue
        found: dict[str, Any] = {"device": "cpu"}
        if torch.cuda.is_available():
            found = {"device": torch.cuda.get_device_name(), "product_tflops": round(product_rate() / 1e12)}
            torch.cuda.empty_cache()
        print(json.dumps({**found, **compared(name, options)}), flush=True)


if __name__ == "__main__":
    main()
