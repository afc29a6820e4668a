"""Loss curves of a real model trained in bf16 and with `--fp8`, on the same real text, in the same order.

    python benchmarks/fp8_curves.py --text chats.jsonl
    python benchmarks/fp8_curves.py --text a.txt --model FOLDER --steps 3 --length 64 --rows 2 --emulate

SmolLM2-135M, converted from the GGUF file of the assets (or any folder, by --model), fully trained; .txt files and
records with a text are documents, other records conversations. Both runs go at once on one device, for nothing is
timed. Prints one JSON line: for each the loss of the first step, the mean of the last tenth of the steps, and that of
what was held out; `ratio` is fp8's mean over bf16's, `worst` the largest of any window of that length. The claim is a
ratio within 1 %. --emulate makes fp8's products on CPU, slowly, to try this script.
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
sys.path.insert(0, str(ROOT))

MODEL_FILE = "gguf/SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = "7"
PLAIN = ["-m", "jllm", "train"]
EMULATED = [
    "-c",
    "import sys, jllm.train.fp8 as fp8; fp8.EMULATED_ON = ('cpu',); from jllm.cli import main; main(sys.argv[1:])",
    "train",
]


def make_model(scratch: Path) -> Path:
    """The folder of the GGUF file among the assets."""
    assets = os.environ.get("JLLM_ASSETS")
    if assets is None or not (Path(assets) / MODEL_FILE).is_file():
        raise SystemExit(f"no {MODEL_FILE} in JLLM_ASSETS: make assets, or give --model")
    command = [sys.executable, "tools/gguf2hf.py", "--input", str(Path(assets) / MODEL_FILE)]
    ran(subprocess.Popen([*command, "--output", str(scratch / "model")], **SILENT))
    return scratch / "model"


SILENT: dict[str, Any] = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def ran(process: "subprocess.Popen[str]") -> None:
    """Wait for it."""
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, process.args))}\n{said[-4000:]}")  # type: ignore[arg-type]


def has_documents(path: Path) -> bool:
    """Whether a file is plain text, or its first record has a text."""
    if path.suffix == ".txt":
        return True
    with path.open(encoding="utf-8") as lines:
        try:
            return "text" in json.loads(lines.readline())
        except ValueError:
            return False


def make_data(texts: list[Path], model: Path, scratch: Path, *, length: int) -> tuple[list[Path], list[Path]]:
    """Data sets of the texts, and what was held out of each."""
    trained, held_out = [], []
    for number, path in enumerate(texts):
        output, held = scratch / f"data-{number}", scratch / f"held-{number}"
        kind = ["--type", "pretrain", "--stack"] if has_documents(path) else ["--type", "ft", "--packing", "best_fit"]
        command = [sys.executable, "-m", "jllm", "raw2ids", "--input", str(path.resolve()), "--output", str(output)]
        command += [*kind, "--tokenizer", str(model), "--max_len", str(length + 1)]
        ran(subprocess.Popen([*command, "--eval_fraction", "0.05", "--eval_output", str(held)], **SILENT))
        trained.append(output)
        held_out.append(held)
    return trained, held_out


def curve(log: Path) -> tuple[list[float], float]:
    """The loss of each step, and the mean of what was held out."""
    records = [json.loads(line) for line in (log / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    last = max(record["step"] for record in records if "eval_loss" in record)
    held = [record["eval_loss"] for record in records if "eval_loss" in record and record["step"] == last]
    return losses, sum(held) / len(held)


def compared(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Both runs."""
    model = options.model.resolve() if options.model is not None else make_model(scratch)
    trained, held_out = make_data(options.text, model, scratch, length=options.length)
    line = ["-m", str(model), "--train_data", *with_option("--train_data", trained)]
    line += ["--eval_data", *with_option("--eval_data", held_out), "--seq_len", str(options.length)]
    line += ["--micro_batch_size", str(options.rows), "--max_steps", str(options.steps), "--seed", SEED]
    line += ["--learning_rate", str(options.learning_rate), "--num_warmup_steps", str(options.steps // 10)]
    line += ["--steps_per_eval", str(options.steps), *options.further.split()]
    running = {}
    for recipe in ("off", options.fp8):
        start = EMULATED if options.emulate and recipe != "off" else PLAIN
        command = [sys.executable, *start, *line, "--fp8", recipe, "--log_dir", str(scratch / recipe)]
        running[recipe] = subprocess.Popen(command, **SILENT)
    try:
        for process in running.values():
            ran(process)
    finally:
        for process in running.values():
            process.kill()
    window = max(1, options.steps // 10)
    curves = {recipe: curve(scratch / recipe) for recipe in running}
    means = {
        recipe: [sum(losses[end - window : end]) / window for end in range(window, len(losses) + 1)]
        for recipe, (losses, _) in curves.items()
    }
    found: dict[str, Any] = {"benchmark": "fp8_curves", "recipe": options.fp8, "steps": options.steps}
    for name, recipe in (("bf16", "off"), ("fp8", options.fp8)):
        losses, held = curves[recipe]
        found[name] = {"first": round(losses[0], 4), "last": round(means[recipe][-1], 4), "held_out": round(held, 4)}
    ratios = [fp8 / bf16 for fp8, bf16 in zip(means[options.fp8], means["off"], strict=True)]
    found["ratio"] = round(ratios[-1], 4)
    found["held_out_ratio"] = round(curves[options.fp8][1] / curves["off"][1], 4)
    found["worst"] = round(max(ratios), 4)
    return found


def with_option(name: str, folders: list[Path]) -> list[str]:
    """Folders as an option that may be repeated, whose name stands before the first one already."""
    return [word for folder in folders for word in (name, str(folder))][1:]


def main() -> None:
    """Train twice, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", action="extend", help="files of documents or conversations")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder in place of the assets' model")
    parser.add_argument("--fp8", default="tensorwise", help="the recipe")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--further", default="", help="further options of both command lines")
    parser.add_argument("--emulate", action="store_true", help="on CPU")
    options = parser.parse_args()
    import torch

    if options.text is None:
        print(json.dumps({"benchmark": "fp8_curves", "skipped": "no --text"}))
    elif not options.emulate and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)):
        print(json.dumps({"benchmark": "fp8_curves", "skipped": "no CUDA device with fp8"}))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(compared(options, Path(scratch))))


if __name__ == "__main__":
    main()
