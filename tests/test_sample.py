"""Answers of a model, scored and written: pairs differ, the best is the best, and a killed run goes on by line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.tokenizers_for_tests import make_byte_tokenizer
from tests.fixtures import tiny_llama

ROOT = Path(__file__).resolve().parent.parent
REWARD = """
def reward(prompt, answers):
    return [answer.count("e") - len(answer) / 1000 + len(prompt) for answer in answers]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("sample")
    make_byte_tokenizer(folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    tiny_llama(folder / "model", tied=True, layers=2, vocabulary=len(tokenizer))
    (folder / "reward.py").write_text(REWARD)
    prompts = [{"prompt": f"number {n}", "chosen": f"the answer {n}"} for n in range(7)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in prompts))
    return folder


def sample(folder: Path, output: Path, *more: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command: list[object] = [sys.executable, ROOT / "tools/sample.py", "--model", folder / "model", "--prompts",
                             folder / "prompts.jsonl", "-o", output, "--batch_size", 3, "-n", 4, *more]  # fmt: skip
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=200)
    assert not check or result.returncode == 0, result.stderr
    return result


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


LONG = ("--max_new_tokens", 4000, "--temperature", 3.0)
"""A random model meets its end-of-text sooner or later."""


def test_pairs(folder: Path, tmp_path: Path) -> None:
    """And going on behind the last whole batch, after what a kill may leave."""
    more = ("--reward", folder / "reward.py", *LONG)
    said = sample(folder, tmp_path / "pairs.jsonl", *more).stdout
    found = lines_of(tmp_path / "pairs.jsonl")
    assert found
    assert f"{len(found)} records written" in said
    for each in found:
        assert each["prompt"] == f"number {each['index']}"
        assert each["chosen"] != each["rejected"]
        scores = [each[side].count("e") - len(each[side]) / 1000 for side in ("chosen", "rejected")]
        assert scores[0] > scores[1]
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl"}
    whole = (tmp_path / "pairs.jsonl").read_bytes()
    # As a run leaves it that is killed in its second batch: all of the first, and a torn line.
    options = {"output": tmp_path / "pairs.jsonl"}
    sys.path.insert(0, str(ROOT))
    from tools.sample import SampleConfig, take_up

    (tmp_path / "pairs.jsonl").unlink()
    config = SampleConfig(model=folder / "model", prompts=folder / "prompts.jsonl", reward=folder / "reward.py",
                          batch_size=3, answers=4, max_new_tokens=4000, temperature=3.0, **options)  # fmt: skip
    assert take_up(config) == 0
    first = [line for line in whole.splitlines(keepends=True) if json.loads(line)["index"] < 3]
    torn = b'{"index": 3, "prompt": "numb'
    (tmp_path / "pairs.jsonl").write_bytes(b"".join(first) + b'{"batch": 0, "is_last": false}\n' + torn)
    sample(folder, tmp_path / "pairs.jsonl", *more)
    assert (tmp_path / "pairs.jsonl").read_bytes() == whole


def test_rejected_answers_are_generated_and_differ(folder: Path, tmp_path: Path) -> None:
    sample(folder, tmp_path / "r.jsonl", "--write", "rejected", *LONG)
    found = lines_of(tmp_path / "r.jsonl")
    assert found
    for each in found:
        assert each["chosen"] == f"the answer {each['index']}"
        assert each["rejected"]
        assert each["rejected"] != each["chosen"]


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def reward(prompt, answers):\n    return [1.0]\n")
    (tmp_path / "none.py").write_text("x = 1\n")
    (tmp_path / "there.jsonl").write_text("{}\n")
    for more, said in (
        (("--write", "best"), "--write best needs --reward"),
        (("--reward", tmp_path / "none.py"), "has no function reward(prompt, answers)"),
        (("--reward", tmp_path / "bad.py", *LONG), "give one finite number for each"),
        (("--reward", folder / "reward.py", "-n", 1), "a pair has two answers"),
        (("--reward", folder / "reward.py", "--field", "ask"), 'in its field "ask"'),
        (("--reward", folder / "reward.py", "-o", tmp_path / "there.jsonl"), "is there already"),
    ):
        end = sample(folder, tmp_path / "x.jsonl", *more, check=False)
        assert end.returncode == 2, (more, end.stderr)
        assert said in end.stderr
        assert "Traceback" not in end.stderr
        assert sum(line.startswith("error: ") for line in end.stderr.splitlines()) == 1
