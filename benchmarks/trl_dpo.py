"""Losses of preference pairs beside those of TRL: the same model, the same pairs, the same optimizer, step by step.

    python -m venv trl-env && trl-env/bin/pip install trl
    python benchmarks/trl_dpo.py --trl trl-env/bin/python

TRL has an environment of its own, and trains on padded pairs with a reference model beside the trained one; jllm trains
on the same pairs packed, with references that it wrote before. Both in fp32 on CPU, a Llama of some 200,000 parameters,
20 steps of AdamW on 4 pairs. One JSON line a loss: the largest differences of loss and rewards over all steps; at most
1e-4 is asked for. ORPO and SimPO are not compared: TRL's are trainers of their own, and ORPO has another form there.
"skipped" without --trl.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LOSSES = {"dpo": "sigmoid", "ipo": "ipo", "apo_zero": "apo_zero", "apo_down": "apo_down"}
"""Ours → TRL's."""
STEPS, PAIRS, RATE, BETA, VOCABULARY = 20, 4, 1e-3, 0.1, 300
BAR = 1e-4
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")

Pair = tuple[list[int], list[int], list[int]]


def make_pairs() -> list[Pair]:
    """Prompts with two answers, by ids."""
    generator = np.random.default_rng(0)

    def some(most: int) -> list[int]:
        return [int(each) for each in generator.integers(3, VOCABULARY, generator.integers(3, most))]

    return [(some(12), some(30), some(30)) for _ in range(STEPS * PAIRS)]


def write_model(folder: Path) -> None:
    """A small Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_set(folder: Path, pairs: list[Pair]) -> None:
    """A data set with the pairs of a step in each row."""
    from jllm.data.dataset.manifest import PREFERENCE, Manifest, entry_of_written, write_manifest
    from jllm.data.dataset.shards import ShardWriter
    from jllm.data.packing.best_fit import BestFitPacker
    from jllm.data.packing.documents import Documents

    path = folder / "set-00000/set-00000-00000.zstd.parquet"
    with ShardWriter(path, columns=("input_ids", "labels", "cu_seqlens")) as writer:
        for at in range(0, len(pairs), PAIRS):
            sides = [(prompt, answer) for prompt, *answers in pairs[at : at + PAIRS] for answer in answers]
            ids = np.array([each for prompt, answer in sides for each in prompt + answer], dtype=np.int32)
            labels = [each for prompt, answer in sides for each in [-100] * len(prompt) + answer]
            offsets = np.cumsum([0, *(len(prompt) + len(answer) for prompt, answer in sides)]).astype(np.int64)
            packer = BestFitPacker(int(offsets[-1]), labels=True, pairs=True)
            packer.feed(Documents(ids=ids, offsets=offsets, labels=np.array(labels, dtype=np.int32)).in_pairs())
            for batch in packer.finish():
                writer.write(batch)
    entry = entry_of_written(path, folder, writer.statistics)
    write_manifest(folder, Manifest(command="benchmark", options={}, files=(entry,), kind=PREFERENCE))


def run_ours(folder: Path, loss: str) -> list[dict[str, float]]:
    """The records of a run."""
    command = [sys.executable, "-m", "jllm", "train", "--model", str(folder / "model"), "--precision", "fp32"]
    data = ["--train_data", str(folder / "ref"), "--no_shuf", "--loss", loss, "--beta", str(BETA)]
    optimizer = ["--learning_rate", str(RATE), "--lr_scheduler_type", "constant", "--num_warmup_steps", "0"]
    optimizer += ["--adam_beta1", "0.9", "--adam_beta2", "0.999", "--weight_decay", "0", "--gradient_clipping", "1.0"]
    log = ["--max_steps", str(STEPS), "--log_dir", str(folder / f"log-{loss}")]
    if not (folder / "ref").is_dir():
        _call([*command, "--train_data", str(folder / "data"), "--write_ref_logps", str(folder / "ref")])
    _call([*command, *data, *optimizer, *log])
    lines = (folder / f"log-{loss}/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def _call(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def as_trl(folder: Path, loss: str) -> None:
    """TRL's part, in its environment: prints the losses and rewards of all steps."""
    import tokenizers
    import torch
    from datasets import Dataset  # type: ignore[import-not-found, unused-ignore]
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer  # type: ignore[import-not-found, unused-ignore]

    found: list[dict[str, float]] = []

    class Recorded(DPOTrainer):  # type: ignore[misc, unused-ignore]
        """Takes ids as they are, and keeps every number with all its digits."""

        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset

        def _compute_loss(self, *arguments: Any, **named: Any) -> Any:
            given = super()._compute_loss(*arguments, **named)
            value = given[0] if isinstance(given, tuple) else given
            metrics = self._metrics["train"]
            found.append({"loss": float(value.detach()), **{name: float(metrics[name][-1]) for name in REWARDS}})
            return given

    torch.set_num_threads(1)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{n}": n for n in range(VOCABULARY)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2", bos_token="t1")
    given = json.loads((folder / "pairs.json").read_text())
    texts = {"prompt": "", "chosen": "", "rejected": ""}
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [texts | dict(zip(names, pair, strict=True)) for pair in given]
    models = [
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, trust_remote_code=False)
        for _ in range(2)
    ]
    config = DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=PAIRS, max_steps=STEPS, learning_rate=RATE,
        lr_scheduler_type="constant", warmup_steps=0, beta=BETA, loss_type=[LOSSES[loss]], max_grad_norm=1.0,
        weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999, optim="adamw_torch", bf16=False, fp16=False, use_cpu=True,
        report_to=[], logging_steps=1, save_strategy="no", max_length=None, gradient_checkpointing=False,
        disable_dropout=True,
    )  # fmt: skip
    trainer = Recorded(
        model=models[0], ref_model=models[1], args=config, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    print(json.dumps(found[:STEPS]))


def compared(folder: Path, loss: str, trl: str) -> dict[str, Any]:
    """The largest differences over all steps."""
    theirs = json.loads(_call([trl, str(Path(__file__)), "--as_trl", str(folder), loss]).splitlines()[-1])
    ours = run_ours(folder, loss)
    assert len(ours) == len(theirs) == STEPS
    differences = {
        name: max(abs(one[name] - other[name]) for one, other in zip(ours, theirs, strict=True))
        for name in ("loss", *REWARDS[:3])
    }
    return {
        "benchmark": "trl_dpo",
        "loss": loss,
        "steps": STEPS,
        **{f"largest_difference_{name}": float(f"{value:.3g}") for name, value in differences.items()},
        "first_and_last": [round(ours[0]["loss"], 5), round(ours[-1]["loss"], 5)],
        "is_within_1e-4": max(differences.values()) <= BAR,
    }


def main() -> None:
    """Compare, and print a line for each loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("losses", nargs="*", choices=[*LOSSES, []])
    parser.add_argument("--trl", help="Python of an environment that has trl")
    parser.add_argument("--as_trl", nargs=2, metavar=("FOLDER", "LOSS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_trl:
        as_trl(Path(options.as_trl[0]), options.as_trl[1])
        return
    if options.trl is None:
        print(json.dumps({"benchmark": "trl_dpo", "skipped": "give --trl PYTHON of an environment that has trl"}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(folder / "model")
        pairs = make_pairs()
        (folder / "pairs.json").write_text(json.dumps(pairs))
        write_set(folder / "data", pairs)
        for loss in options.losses or LOSSES:
            print(json.dumps(compared(folder, loss, options.trl)), flush=True)


if __name__ == "__main__":
    main()
