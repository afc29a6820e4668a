"""Answers of a model to prompts, scored by a function of yours: preference pairs or the best answers, as JSON lines.

    python tools/sample.py --model run/output --prompts prompts.jsonl --reward my-reward.py -n 8 -o pairs.jsonl

`my-reward.py` has a function `reward(prompt, answers)`, which gives one number for each answer. A line of `--prompts`
is an object whose field `prompt` (`--field`) is a text or a list of messages. What is written (`--write`):

* `preference`: the best answer as `chosen`, the worst as `rejected`; for `raw2ids -t preference`
* `best`: the best answer, as `messages`; for `raw2ids -t ft` (best of n)
* `rejected`: what the record has as `chosen`, and the worst of the model's answers as `rejected`, without `--reward`
  the first one; answers that are the chosen one do not count

Answers that reach `--max_new_tokens` are left out, since they have no end; a prompt without answers that differ is
left out too; both are counted.

Generation is transformers' own, in batches, by a seed for each batch. Guarantees: killed and run again with the same
options it goes on behind the last whole batch, and the file is that of an undisturbed run. Cost: the model in memory,
n x `--batch_size` answers at a time.
"""

import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from jllm import atomic
from jllm.errors import UserError, say
from jllm.options import command, option

Reward = Callable[[Any, Sequence[str]], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    model: Path = option(MISSING, help="Hugging Face folder", metavar="FOLDER")
    prompts: Path = option(MISSING, help="JSON lines with a prompt each", metavar="FILE")
    output: Path = option(MISSING, "-o", help="JSON lines that are written, and gone on with", metavar="FILE")
    reward: Path | None = option(None, help="Python file with reward(prompt, answers)", metavar="FILE")
    write: str = option("preference", help="what is written", choices=("preference", "best", "rejected"))
    field: str = option("prompt", help="field of the prompt: a text, or a list of messages")
    answers: int = option(4, "-n", help="answers to each prompt", least=1, most=1024)
    batch_size: int = option(8, help="prompts at a time", least=1, most=4096)
    max_new_tokens: int = option(512, help="longest answer", least=1, most=1 << 20)
    temperature: float = option(1.0, help="of the sampling", most=100, above_least=True)
    top_p: float = option(1.0, help="share of the probability that is sampled from", most=1, above_least=True)
    seed: int = option(1234, help="of the sampling")
    dtype: str = option("float32", help="dtype to compute in", choices=("float32", "bfloat16"))

    def __post_init__(self) -> None:
        from jllm.options import check_ranges

        check_ranges(self)
        if self.reward is None and self.write != "rejected":
            raise UserError(f"--write {self.write} needs --reward, a Python file with reward(prompt, answers)")
        if self.write == "preference" and self.answers < 2:
            raise UserError(f"--answers {self.answers}: a pair has two answers; give at least 2")


@dataclass(kw_only=True)
class Told:
    """What became of the prompts."""

    written: int = 0
    cut: int = 0
    left_out: list[int] = field(default_factory=list)


@command(SampleConfig, name="sample")
def main(config: SampleConfig) -> None:
    """Sample answers to prompts, score them, and write pairs or the best ones."""
    check_files(config)
    reward = load_reward(config.reward) if config.reward is not None else None
    records = list(read_prompts(config))
    done = take_up(config)
    if done * config.batch_size >= len(records):
        say(f"{config.output}: finished earlier")
        return
    told, model = Told(), Sampler(config)
    with config.output.open("a", encoding="utf-8") as file:
        for start in range(done * config.batch_size, len(records), config.batch_size):
            batch = records[start : start + config.batch_size]
            found = model.answers([record[config.field] for record in batch], number=start // config.batch_size)
            lines = []
            for index, (record, answers) in enumerate(zip(batch, found, strict=True), start):
                told.cut += config.answers - len(answers)
                made = record_of(config, record, index, answers, reward)
                if made is None:
                    told.left_out.append(index + 1)
                else:
                    lines.append(json.dumps(made, ensure_ascii=False) + "\n")
            is_last = start + config.batch_size >= len(records)
            lines.append(json.dumps({"batch": start // config.batch_size, "is_last": is_last}) + "\n")
            file.write("".join(lines))
            file.flush()
            told.written += len(lines) - 1
    tidy(config.output)
    some = f", such as line {told.left_out[0]}" if told.left_out else ""
    say(
        f"{config.output}: {told.written:,} records written; {len(told.left_out):,} prompts left out, whose answers do"
        f" not differ{some}; {told.cut:,} answers had no end within {config.max_new_tokens} tokens"
    )


def check_files(config: SampleConfig) -> None:
    """Raises:
    UserError: there is no model or no prompts, or the output is the file of the prompts.
    """
    if not (config.model / "config.json").is_file():
        raise UserError(f"--model {config.model}: no config.json in it; give a Hugging Face folder")
    if not config.prompts.is_file():
        raise UserError(f"--prompts {config.prompts}: no such file; give JSON lines with a prompt each")
    if config.output.resolve() == config.prompts.resolve():
        raise UserError(f"--output {config.output}: is the file of the prompts; give another")


def read_prompts(config: SampleConfig) -> Iterator[dict[str, Any]]:
    """The records of the file of prompts.

    Raises:
        UserError: a line is none.
    """
    with config.prompts.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{config.prompts}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: not JSON ({error})") from None
            if not isinstance(record, dict) or not isinstance(record.get(config.field), str | list):
                raise UserError(f'{where}: no text and no messages in its field "{config.field}"; name it with --field')
            if config.write == "rejected" and not isinstance(record.get("chosen"), str):
                raise UserError(f'{where}: --write rejected needs its answer as a text in "chosen"')
            yield record


def load_reward(path: Path) -> Reward:
    """The function of a user's file.

    Raises:
        UserError: there is none, or the file cannot be run.
    """
    spec = importlib.util.spec_from_file_location("jllm_reward", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"--reward {path}: no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is anybody's program
        raise UserError(f"--reward {path}: cannot be imported: {type(error).__name__}: {error}") from None
    found = getattr(module, "reward", None)
    if not callable(found):
        raise UserError(f"--reward {path}: has no function reward(prompt, answers)")
    return found  # type: ignore[no-any-return]


def scores_of(reward: Reward, config: SampleConfig, prompt: Any, answers: Sequence[str], index: int) -> list[float]:
    """One finite number for each answer.

    Raises:
        UserError: the function fails, or gives something else.
    """
    where = f"--reward {config.reward} on prompt {index + 1}"
    try:
        scores = [float(each) for each in reward(prompt, list(answers))]
    except Exception as error:  # it is anybody's program
        raise UserError(f"{where}: {type(error).__name__}: {error}") from None
    if len(scores) != len(answers) or not all(map(math.isfinite, scores)):
        raise UserError(f"{where}: gave {scores} for {len(answers)} answers; give one finite number for each")
    return scores


def record_of(
    config: SampleConfig, record: dict[str, Any], index: int, answers: Sequence[str], reward: Reward | None
) -> dict[str, Any] | None:
    """What is written of a prompt; None where its answers do not differ.

    The places of prompts are in `index`, which `raw2ids` knows to say nothing.
    """
    prompt = record[config.field]
    if config.write == "rejected":
        answers = [each for each in answers if each.strip() != record["chosen"].strip()]
    answers = list(dict.fromkeys(answers))
    if not answers or (config.write == "preference" and len(answers) < 2):
        return None
    scores = scores_of(reward, config, prompt, answers, index) if reward is not None else [0.0] * len(answers)
    best, worst = max(range(len(answers)), key=scores.__getitem__), min(range(len(answers)), key=scores.__getitem__)
    if config.write == "best":
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return {"index": index, "messages": [*asked, {"role": "assistant", "content": answers[best]}]}
    if config.write == "rejected":
        return {"index": index, "prompt": prompt, "chosen": record["chosen"], "rejected": answers[worst]}
    if scores[best] == scores[worst]:
        return None
    return {"index": index, "prompt": prompt, "chosen": answers[best], "rejected": answers[worst]}


def take_up(config: SampleConfig) -> int:
    """How many batches are done; what a killed run left behind the last of them is cut off.

    Raises:
        UserError: the file is not what this command left.
    """
    options = json.dumps({key: str(value) for key, value in vars(config).items() if key != "output"}, sort_keys=True)
    plan = _plan_of(config.output)
    if not config.output.exists():
        atomic.write_text(plan, options)
        return 0
    if not plan.is_file():
        raise UserError(f"--output {config.output}: is there already; remove it, or give another file")
    if plan.read_text(encoding="utf-8") != options:
        raise UserError(f"--output {config.output}: was begun with other options; remove it, and {plan}")
    batches, end, at = 0, 0, 0
    with config.output.open("rb") as file:
        for line in file:
            at += len(line)
            if line.startswith(b'{"batch"') and line.endswith(b"\n"):
                batches, end = batches + 1, at
    with config.output.open("r+b") as file:
        file.truncate(end)
    return batches


def _plan_of(output: Path) -> Path:
    """Where the options of an unfinished file are."""
    return output.with_name(f".{output.name}.options")


def tidy(output: Path) -> None:
    """Leave nothing but the records."""
    kept = [line for line in output.read_text(encoding="utf-8").splitlines(keepends=True) if line[:8] != '{"batch"']
    atomic.write_text(output, "".join(kept))
    _plan_of(output).unlink(missing_ok=True)


class Sampler:
    """The model, and how it is asked."""

    def __init__(self, config: SampleConfig) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        from jllm.data.tokenizer.facts import without_notices
        from jllm.models.remote_code import check_no_remote_code
        from jllm.models.weights.source import weight_files

        self._config = config
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        logging.disable_progress_bar()
        with without_notices():
            check_no_remote_code(config.model)
            weight_files(config.model, advice="download them")  # whose index names files of the folder alone
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                config.model, trust_remote_code=False, padding_side="left"
            )
            model = AutoModelForCausalLM.from_pretrained(
                config.model, dtype=getattr(torch, config.dtype), trust_remote_code=False
            )
        self._model = model.eval().to(self._device)
        if self._tokenizer.eos_token is None:
            raise UserError(f"--model {config.model}: its tokenizer has no end-of-text token, so that no answer ends")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        ends = self._model.generation_config.eos_token_id
        known = ends if isinstance(ends, list) else [ends] if ends is not None else []
        self._ends = [*dict.fromkeys([*known, self._tokenizer.eos_token_id])]

    def answers(self, prompts: Sequence[Any], *, number: int) -> list[list[str]]:
        """The answers to each prompt that have an end; `number` is that of the batch."""
        import torch

        given = self._tokenizer([self._text(each) for each in prompts], padding=True, return_tensors="pt",
                                add_special_tokens=not self._tokenizer.chat_template)  # fmt: skip
        given = {name: given[name].to(self._device) for name in ("input_ids", "attention_mask")}
        torch.manual_seed(self._config.seed * 1_000_003 + number)
        with torch.inference_mode():
            written = self._model.generate(
                **given,
                do_sample=True,
                num_return_sequences=self._config.answers,
                max_new_tokens=self._config.max_new_tokens,
                temperature=self._config.temperature,
                top_p=self._config.top_p,
                top_k=0,
                eos_token_id=self._ends,
                pad_token_id=self._tokenizer.pad_token_id,
            )[:, given["input_ids"].shape[1] :].tolist()
        found: list[list[str]] = [[] for _ in prompts]
        for row, ids in enumerate(written):
            end = next((at for at, each in enumerate(ids) if each in self._ends), None)
            if end is None:
                continue
            text = self._tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
            if text:
                found[row // self._config.answers].append(text)
        return found

    def _text(self, prompt: Any) -> str:
        if self._tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            text: str = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            return text
        if isinstance(prompt, str):
            return prompt
        raise UserError(f"--model {self._config.model}: has no chat template for messages; give prompts that are texts")


if __name__ == "__main__":
    main()
