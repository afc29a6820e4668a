"""The loss of a Hugging Face folder on a data set, by plain transformers: no pipeline, no DeepSpeed, no trainer.

    python tools/evaluate.py --model demo-run/output --data demo-run/eval

Prints the mean loss over the trained targets (a document's first token and tokens whose label is -100 are none) and
their number; `--json` writes both to a file, as one JSON object. It checks the trainer's own evaluation from outside:
the two share only the reading of shards. Documents packed in a row see each other, as in training without
`--block_mask`. Cost: the model in memory in `--dtype`, one row at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from jllm import atomic
from jllm.errors import UserError, say
from jllm.options import command, option

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    model: Path = option(MISSING, help="Hugging Face folder", metavar="FOLDER")
    data: Path = option(MISSING, help="data set: a folder of token-id shards", metavar="FOLDER")
    dtype: str = option("float32", help="dtype to compute in", choices=("float32", "bfloat16"))
    json: Path | None = option(None, help="also write the result to this file", metavar="FILE")

    def __post_init__(self) -> None:
        if not (self.model / "config.json").is_file():
            raise UserError(f"--model {self.model}: no config.json in it; give a Hugging Face folder")


@command(EvaluateConfig, name="evaluate")
def main(config: EvaluateConfig) -> None:
    """Evaluate a Hugging Face folder on a data set with plain transformers."""
    rows = list(read_rows(config.data))
    loss, targets = evaluate(load(config.model, config.dtype), rows)
    say(f"{config.model}: loss {loss:.4f}, perplexity {math.exp(loss):.3f}, over {targets:,} tokens of {config.data}")
    if config.json is not None:
        atomic.write_json(config.json, {"eval_loss": loss, "eval_tokens": targets})


def read_rows(folder: Path) -> Iterator[tuple[list[int], list[int]]]:
    """Each row of a data set without its padding: ids, and targets that line up with them (unshifted)."""
    from jllm.data.dataset.columns import COLUMNS
    from jllm.data.dataset.manifest import open_data_set
    from jllm.data.dataset.shards import ShardReader

    for path in open_data_set(folder).paths:
        for batch in ShardReader(path, columns=COLUMNS):
            for row in batch.to_pylist():
                boundaries = row.get("cu_seqlens") or [0, len(row["input_ids"])]
                ids = row["input_ids"][: boundaries[-1]]
                targets = row.get("labels", row["input_ids"])[: boundaries[-1]]
                for start in boundaries[:-1]:
                    targets[start] = IGNORED
                yield ids, targets


def load(folder: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from jllm.data.tokenizer.facts import without_notices
    from jllm.models.remote_code import check_no_remote_code
    from jllm.models.weights.source import weight_files

    logging.disable_progress_bar()
    with without_notices():
        check_no_remote_code(folder)
        weight_files(folder, advice="download them")  # whose index names files of the folder alone
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=False).eval()


def evaluate(model: Any, rows: list[tuple[list[int], list[int]]]) -> tuple[float, int]:
    """Mean cross entropy over all targets of all rows, and their number."""
    import torch

    total, targets = 0.0, 0
    for ids, labels in rows:
        if len(ids) < 2:
            continue
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
        wanted = torch.tensor(labels[1:])
        total += torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum").item()
        targets += int((wanted != IGNORED).sum())
    if targets == 0:
        raise UserError("the data set has no token to predict; give one with rows of two tokens or more")
    return total / targets, targets


if __name__ == "__main__":
    main()
