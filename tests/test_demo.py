"""The demo's tools: held-out text is really held out, the converted model is right, its evaluation is exact."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jllm.data.dataset.columns import Column
from tests.data.tokenizers_for_tests import make_byte_tokenizer
from tests.data.typed_sets import make_typed_set
from tests.fixtures import random_rows, tiny_llama, write_rows

ROOT = Path(__file__).resolve().parent.parent


def run_tool(name: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, ROOT / "tools" / f"{name}.py", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo-text")
    result = run_tool("demo_text", "-o", folder)
    assert result.returncode == 0, result.stderr
    return folder


def topics(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_long_paragraph_of_a_held_out_topic_is_trained_on(text: Path) -> None:
    held_out, train = topics(text / "held-out/topics.jsonl"), topics(text / "train/topics.jsonl")
    trained = {" ".join(part.split()) for topic in train for part in re.split(r"\n\s*\n", topic)}
    unseen = [" ".join(part.split()) for topic in held_out for part in re.split(r"\n\s*\n", topic)]
    long_ones = [part for part in unseen if len(part) >= 60]
    assert len(held_out) >= 5
    assert len(long_ones) >= 20
    assert not trained & set(long_ones)
    assert sum(map(len, train)) > 20 * sum(map(len, held_out))


def test_topics_have_blank_lines_inside_and_docstrings_between(text: Path) -> None:
    assert any("\n\n" in topic for topic in topics(text / "train/topics.jsonl"))
    assert (text / "train/docstrings.txt").read_text(encoding="utf-8").count("\n\n") > 500


def test_the_same_python_gives_the_same_text(text: Path, tmp_path: Path) -> None:
    assert run_tool("demo_text", "-o", tmp_path).returncode == 0
    for path in sorted(text.rglob("*.*")):
        assert (tmp_path / path.relative_to(text)).read_bytes() == path.read_bytes()


def test_the_converted_model_is_a_plain_hugging_face_folder(real_model: Path) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    config = json.loads((real_model / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["model_type"], config["dtype"], config["tie_word_embeddings"]) == ("llama", "bfloat16", True)
    with safe_open(real_model / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(real_model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == 2


def test_the_converted_tokenizer_is_the_models_own(real_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("hi").input_ids == tokenizer("hi", add_special_tokens=False).input_ids
    # SmolLM2 was trained with each digit apart, also after a space.
    assert tokenizer.tokenize("x  12 a3") == ["x", "ĠĠ", "1", "2", "Ġa", "3"]
    sample = "Héllo 世界 \t 🙂\n\n    def f(x):  # don't\n"
    assert tokenizer.decode(tokenizer(sample).input_ids) == sample
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(chat).input_ids[0] == 1


@pytest.mark.parametrize(
    ("tool", "arguments", "expected"),
    [
        ("gguf2hf", ["-i", "nowhere.gguf", "-o", "x"], "--input nowhere.gguf: no such file"),
        ("gguf2hf", ["-i", str(ROOT / "setup.py"), "-o", "nowhere/x"], "not a readable GGUF file"),
        ("gguf2hf", ["-i", str(ROOT / "setup.py"), "-o", str(ROOT / "tools")], "exists already"),
        ("evaluate", ["--model", "nowhere", "--data", "x"], "--model nowhere: no config.json"),
        ("ask", ["--model", "nowhere", "-p", "hi"], "--model nowhere: no config.json"),
        ("demo", ["--steps", "0"], "--steps 0: it must be at least 1"),
        ("get_assets", ["--only", "everything"], "'everything' is not one of"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tool: str, arguments: list[str], expected: str) -> None:
    result = run_tool(tool, *arguments)
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("tool", sorted(path.stem for path in (ROOT / "tools").glob("*.py")))
def test_every_tool_has_help(tool: str) -> None:
    result = run_tool(tool, "-h")
    assert result.returncode == 0, result.stderr
    assert result.stdout.lower().startswith("usage:")


def test_evaluation_counts_every_trained_target_once(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    rows = random_rows(12, seed=3, labels=True, packed=True)
    rows[4]["input_ids"] += [0] * 3  # padding lies beyond the last boundary
    rows[4]["labels"] += [0] * 3
    model = tiny_llama(tmp_path / "model", tied=False)
    data = write_rows(tmp_path / "data", rows, files=2)
    result = run_tool("evaluate", "--model", model, "--data", data, "--json", tmp_path / "result.json")
    assert result.returncode == 0, result.stderr

    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    losses = []
    for row in rows:
        length = row["cu_seqlens"][-1]
        with torch.inference_mode():
            logits = plain(input_ids=torch.tensor([row["input_ids"][:length]])).logits[0].double()
        for position in range(1, length):
            if row["labels"][position] != -100 and position not in row["cu_seqlens"]:
                losses.append(-logits[position - 1].log_softmax(-1)[row["labels"][position]].item())
    measured = json.loads((tmp_path / "result.json").read_text())
    assert measured["eval_tokens"] == len(losses)
    assert measured["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_an_answer_stands_alone(tmp_path: Path) -> None:
    """Without what libraries notice about the model, such as settings for sampling that are not used."""
    model = make_byte_tokenizer(tmp_path)
    tiny_llama(model, tied=False, vocabulary=512)
    (model / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.5, "top_k": 3}))
    result = run_tool("ask", "--model", model, "-p", "hi", "--max_new_tokens", "2")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.startswith("> hi\n")


def test_evaluation_reads_no_further_column(tmp_path: Path) -> None:
    """One that is damaged does not matter."""
    import pyarrow.parquet as pq

    model = tiny_llama(tmp_path / "model", tied=False)
    data = make_typed_set(tmp_path / "data", 9, [Column(name="z", element="text")])
    (path,) = data.rglob("*.parquet")
    groups = pq.ParquetFile(path).metadata
    at = next(
        groups.row_group(0).column(index).data_page_offset
        for index in range(groups.num_columns)
        if groups.row_group(0).column(index).path_in_schema.startswith("z")
    )
    damaged = bytearray(path.read_bytes())
    damaged[at : at + 8] = b"\xff" * 8
    path.write_bytes(damaged)
    result = run_tool("evaluate", "--model", model, "--data", data)
    assert result.returncode == 0, result.stderr
