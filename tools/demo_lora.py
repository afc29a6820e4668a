"""LoRA in miniature: questions and answers, adapters on two pipeline stages, merged into the model, asked something.

    make demo-lora                              (or: python tools/demo_lora.py, with .venv/bin on the PATH)
    make demo-lora DATA=questions.jsonl         JSON lines with `question` and `answer`, or any chats that raw2ids reads

Without DATA the questions are about functions of this Python's own library, and the answers are their docstrings.
Runs the commands that a user would type, shows each before it starts, and ends with a table. Everything lands in
`demo-run/lora/`, which is made anew each time; the model is that of `make demo`. The exit code is 0 only if the
held-out loss fell by at least 0.2, and plain transformers, given the merged folder, measures what the trainer measured.

Cost: some minutes on two cores.
"""

import ast
import inspect
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jllm import atomic
from jllm.errors import UserError
from jllm.options import command, option
from jllm.parallel.ports import free_port

RUN = Path("demo-run")
FOLDER = RUN / "lora"
STEPS = 30
MOST_STEPS = 60
SEQUENCE = 256
ROWS_PER_STEP = 8
LEAST_FALL = 0.2
CLOSE = 2e-2  # the trainer adds adapters in fp32 to the model, the merged folder is rounded to bf16
LONGEST = 600
MORE_MODULES = (
    "ast",
    "asyncio",
    "datetime",
    "decimal",
    "dis",
    "fractions",
    "gettext",
    "imaplib",
    "ipaddress",
    "logging",
)


@dataclass(frozen=True, kw_only=True)
class DemoLoraConfig:
    data: Path | None = option(None, help="JSON lines with questions and answers", metavar="FILE")
    steps: int = option(STEPS, least=1, most=MOST_STEPS, help="training steps")

    def __post_init__(self) -> None:
        if self.data is not None and not self.data.is_file():
            raise UserError(f"--data {self.data}: no such file; give JSON lines with question and answer")


@command(DemoLoraConfig, name="demo_lora")
def main(config: DemoLoraConfig) -> None:
    """Train LoRA adapters for a real 135M model in two pipeline stages, merge them, and check the result."""
    from demo import Demo  # beside this script, as the next
    from demo_text import MODULES

    given = config.data.resolve() if config.data is not None else None
    os.chdir(Path(__file__).resolve().parent.parent)
    demo = Demo()
    shutil.rmtree(FOLDER, ignore_errors=True)
    demo.make_model()

    demo.title("questions and answers to token ids; some conversations are held out")
    source = given
    if source is None:
        source = FOLDER / "questions.jsonl"
        atomic.write_text(source, "".join(json.dumps(each) + "\n" for each in questions((*MODULES, *MORE_MODULES))))
    records = count_records(source)
    fraction = min(0.2, max(0.005, 40 / records))
    fields = "--format fields --field_map user=question,assistant=answer " if has_questions(source) else ""
    demo.run(
        "raw2ids",
        f"python -m jllm.raw2ids --input {shlex.quote(str(source))} --output {FOLDER}/data --eval_output {FOLDER}/eval"
        f" {fields}--tokenizer {RUN}/model --max_len {SEQUENCE} --overlong drop --eval_fraction {fraction:.4g}",
    )
    held_out = next(path.parent for path in sorted((FOLDER / "eval").rglob("_manifest.json")))

    demo.title("LoRA: two pipeline stages, one process each; the model stays as it is; evaluated before and after")
    demo.run("train", train_command(config.steps, held_out), on_cpu=True)
    demo.run("info", f"python -m jllm adapter info {FOLDER}/adapter -o {FOLDER}/adapter.html")

    demo.title("the adapters merged into the model, and that in plain transformers")
    demo.run("merge", f"python -m jllm merge -m {RUN}/model --lora {FOLDER}/adapter -o {FOLDER}/merged")
    result = FOLDER / "evaluation-by-transformers.json"
    demo.run("check", f"python tools/evaluate.py --model {FOLDER}/merged --data {held_out} --json {result}")
    question = first_question(source)
    demo.run("check", f"python tools/ask.py --model {RUN}/model --prompt {shlex.quote(question)}")
    demo.run(
        "check", f"python tools/ask.py --model {FOLDER}/merged --prompt {shlex.quote(question)} --max_new_tokens 96"
    )
    sys.exit(report(demo, json.loads(result.read_text())["eval_loss"]))


def train_command(steps: int, held_out: Path) -> str:
    """The trainer's command line."""
    return " ".join(
        (
            f"deepspeed --quiet --num_gpus 2 --master_port {free_port()} --module jllm.train_pipe --model {RUN}/model",
            f"--train_data {FOLDER}/data --eval_data {held_out} --seq_len {SEQUENCE}",
            f"--pipe_parallel_size 2 --per_device_train_batch_size 1 --gradient_accumulation_steps {ROWS_PER_STEP}",
            f"--lora_dim 16 --lora_alpha 32 --max_steps {steps} --learning_rate 2e-3 --precision fp32",
            f"--log_dir {FOLDER}/log --output_dir {FOLDER}/adapter",
        )
    )


def questions(modules: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Functions of standard modules with docstrings: what they do, read from their sources (nothing is imported)."""
    library = Path(os.__file__).parent
    for name in modules:
        files = [library / f"{name}.py", *sorted((library / name).glob("*.py"))]
        for source in filter(Path.is_file, files):
            for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.FunctionDef)
                    and not node.name.startswith("_")
                    and (text := ast.get_docstring(node))
                ):
                    first = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
                    answer = f"`{node.name}({ast.unparse(node.args)})`: {first}"
                    if len(first) > 20 and len(answer) <= LONGEST:
                        yield {"question": f"What does the function {node.name} of {name} do?", "answer": answer}


def count_records(path: Path) -> int:
    with path.open(encoding="utf-8") as file:
        return max(1, sum(1 for line in file if line.strip()))


def has_questions(path: Path) -> bool:
    """Whether a file's records have `question` and `answer`."""
    with path.open(encoding="utf-8") as file:
        try:
            record = json.loads(file.readline())
        except ValueError:
            return False
    return isinstance(record, dict) and {"question", "answer"} <= record.keys()


def first_question(path: Path) -> str:
    """Something to ask, in the words of the file where that has questions."""
    if not has_questions(path):
        return "What is the capital of France?"
    with path.open(encoding="utf-8") as file:
        return str(json.loads(file.readline())["question"])


def report(demo: Any, merged_loss: float) -> int:
    """Print the table; gives the exit code."""
    records = [json.loads(line) for line in (FOLDER / "log" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "eval_loss" in record]
    before, after = evaluations[0]["eval_loss"], evaluations[-1]["eval_loss"]
    size = (FOLDER / "adapter/adapter_model.safetensors").stat().st_size
    whole = (FOLDER / "merged/model.safetensors").stat().st_size
    from demo import failed, print_table

    print_table(
        "jllm demo-lora",
        (
            ("trained", f"{len(steps)} steps, {sum(record['tokens'] for record in steps):,} tokens"),
            ("held-out loss before", f"{before:.4f}"),
            ("held-out loss after", f"{after:.4f}   ({after - before:+.4f})"),
            ("  by plain transformers", f"{merged_loss:.4f}   (the merged folder)"),
            ("adapter", f"{size / 2**20:.1f} MiB; the model: {whole / 2**20:.0f} MiB"),
            ("merging", f"{demo.seconds['merge']:.0f} s, start of the command included"),
            ("whole demo", f"{time.monotonic() - demo.started:.0f} s"),
            ("", ""),
            ("adapter, for peft and vLLM", f"{FOLDER / 'adapter'}"),
            ("what it does, in pictures", f"{FOLDER / 'adapter.html'}"),
            ("merged, Hugging Face", f"{FOLDER / 'merged'}"),
        ),
    )
    status: int = failed(before, after, merged_loss, least_fall=LEAST_FALL, close=CLOSE)
    return status


if __name__ == "__main__":
    main()
