"""A real chat model learns real preference pairs: the whole way from a JSON list to margins.

    python benchmarks/dpo_smol.py --data dpo_en_demo.json

`--data` is a JSON list of LLaMA-Factory's preference records (`conversations`, `chosen`, `rejected`). The 16 shortest
pairs are trained on for 30 steps of SmolLM2-135M-Instruct (`make assets`), by `raw2ids -t preference`,
`--write_ref_logps` and `--loss dpo` as people call them; 8 more are held out. One JSON line: loss of the first step,
accuracy and margins over the first and the last epoch, and the held-out figures. It asks for an accuracy of at least
0.9 and for margins that rise. "skipped" without the data or the assets. Some minutes on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAIRS, HELD, STEPS, ROWS, LENGTH, LONGEST = 16, 8, 30, 1, 512, 2048
GGUF = "gguf/SmolLM2-135M-Instruct.Q4_1.gguf"


def call(*command: object) -> None:
    """Run a command, and end with what it says where it fails."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")


def size_of(record: dict[str, Any]) -> int:
    """Letters of a pair, its prompt counted twice."""
    prompt = sum(len(each["value"]) for each in record["conversations"])
    return 2 * prompt + len(record["chosen"]["value"]) + len(record["rejected"]["value"])


def measured(folder: Path, data: Path, model: Path, rate: float) -> dict[str, Any]:
    """Train, and tell."""
    records = sorted(json.loads(data.read_text(encoding="utf-8")), key=size_of)
    for name, some, length in (
        ("train", records[:PAIRS], LENGTH),
        ("held", records[PAIRS : PAIRS + HELD], LONGEST),
    ):
        (folder / f"{name}.json").write_text(json.dumps(some), encoding="utf-8")
        call("-m", "jllm", "raw2ids", "-i", folder / f"{name}.json", "-o", folder / name, "--tokenizer", model,
             "-t", "preference", "--max_len", length, "--overlong", "error")  # fmt: skip
        call("-m", "jllm", "train", "-m", model, "--train_data", folder / name, "--precision", "fp32",
             "--write_ref_logps", folder / f"{name}-ref")  # fmt: skip
    call("-m", "jllm", "train", "-m", model, "--train_data", folder / "train-ref", "--eval_data",
         f"held={folder / 'held-ref'}", "--loss", "dpo", "--precision", "fp32", "--learning_rate", rate,
         "--lr_scheduler_type", "constant", "--max_steps", STEPS, "--steps_per_eval", STEPS,
         "--per_device_train_batch_size", ROWS, "--log_dir", folder / "log")  # fmt: skip
    lines = [json.loads(line) for line in (folder / "log/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    before, after = (line for line in lines if "eval_loss" in line)

    def mean(some: list[dict[str, Any]], name: str) -> float:
        total = sum(each[name] * each["pairs"] for each in some)
        return round(float(total / sum(each["pairs"] for each in some)), 4)

    epoch = max(1, round(1 / steps[0]["epoch"]))
    return {
        "benchmark": "dpo_smol",
        "pairs": sum(each["pairs"] for each in steps[:epoch]),
        "steps_an_epoch": epoch,
        "first_loss": steps[0]["loss"],
        "accuracy": [mean(some, "rewards/accuracies") for some in (steps[:epoch], steps[-epoch:])],
        "margin": [mean(some, "rewards/margins") for some in (steps[:epoch], steps[-epoch:])],
        "held_out_accuracy": [round(each["rewards/accuracies"], 4) for each in (before, after)],
        "held_out_margin": [round(each["rewards/margins"], 4) for each in (before, after)],
        "held_out_loss": [round(each["eval_loss"], 4) for each in (before, after)],
    }


def main() -> None:
    """Measure, and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rate", type=float, default=2e-5)
    options = parser.parse_args()
    assets = Path(os.environ.get("JLLM_ASSETS") or Path.home() / ".cache" / "jllm-assets")
    for path, way in ((options.data, "give --data FILE"), (assets / GGUF, "make assets")):
        if path is None or not path.is_file():
            print(json.dumps({"benchmark": "dpo_smol", "skipped": f"{path} is not there: {way}"}))
            return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        call("tools/gguf2hf.py", "-i", assets / GGUF, "-o", folder / "model")
        print(json.dumps(measured(folder, options.data.resolve(), folder / "model", options.rate)))


if __name__ == "__main__":
    main()
