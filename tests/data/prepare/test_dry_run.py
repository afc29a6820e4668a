"""`--dry_run`: what it says is what the run makes, and it writes nothing."""

import gzip
import json
import re
from pathlib import Path

import pytest

from jllm.data.dataset.manifest import read_manifest
from tests.data.raw2ids_runs import documents, raw2ids, tree, write_jsonl

CHAT = {"messages": [{"role": "user", "content": "q \x1b[31m"}, {"role": "assistant", "content": "an answer"}]}


def numbers(text: str, pattern: str) -> list[int]:
    found = re.search(pattern, text)
    assert found, text
    return [int(group.replace(",", "")) for group in found.groups()]


@pytest.mark.parametrize("more", [[], ["--stack"], ["--packing", "best_fit"]])
@pytest.mark.parametrize("count", [40, 1500])
def test_what_it_says_of_documents(tmp_path: Path, byte_tokenizer: Path, more: list[str], count: int) -> None:
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", documents(count))
    (tmp_path / "in" / "z.jsonl.gz").write_bytes(gzip.compress(b'{"text": "more"}\n' * 200))
    before = tree(tmp_path)
    words = ["-i", tmp_path / "in", "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain", *more]
    shown = raw2ids(*words, "--dry_run").stdout
    assert tree(tmp_path) == before
    said = shown.splitlines()[: 5 + len(more) // 2 + len(more) % 2]
    assert said[0] == "options that differ from the defaults:"
    assert sorted(line.split()[0] for line in said[1:]) == sorted(
        {"--input", "--output", "--tokenizer", "--type", *more[:1]}
    )
    assert any(line.split() == ["--type", "pretrain", "(default:", "ft)"] for line in said)
    raw2ids(*words)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    (tokens,) = numbers(shown, r"the whole input: (?:about )?([\d,]+) tokens")
    if count == 40:
        assert tokens == manifest.extra["document_tokens"]
        assert numbers(shown, r"([\d,]+) documents, ([\d,]+) tokens, ([\d,]+) trained in ([\d,]+) rows")[1] == tokens
        assert "estimate" not in shown
    else:
        assert abs(tokens - manifest.extra["document_tokens"]) < 0.35 * manifest.extra["document_tokens"]
        assert "(estimate)" in shown
        assert numbers(shown, r"bad records: (\d+) of the first ([\d,]+)") == [0, 1000]
    assert shown.count("--- row ") == min(3, manifest.rows)


def test_what_it_says_of_chats(tmp_path: Path, byte_tokenizer: Path) -> None:
    lines = [json.dumps(CHAT)] * 9 + ['{"messages": 1}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    words = ["-i", tmp_path / "a.jsonl", "-o", tmp_path / "out", "--tokenizer", byte_tokenizer]
    shown = raw2ids(*words, "--chat_template", "chatml", "--dry_run").stdout
    for said in (
        "format: messages", "template: chatml", "<|im_end|> x 18", "bad records: 1 of the first 10", "a.jsonl:10: ",
        "[[an answer<|im_end|>]]", "\\x1b[31m", "nothing was written",
    ):  # fmt: skip
        assert said in shown
    assert "\x1b" not in shown
    assert not (tmp_path / "out").exists()


def test_it_reads_the_beginning(tmp_path: Path, byte_tokenizer: Path) -> None:
    """However large the file is."""
    words = ["-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "--chat_template", "chatml", "--dry_run"]
    read = []
    for copies in (100_000, 200_000, 400_000):  # what is imported and cached is there after the first
        (tmp_path / "a.jsonl").write_text((json.dumps(CHAT) + "\n") * copies)
        before = bytes_read()
        raw2ids("-i", tmp_path / "a.jsonl", *words)
        read.append(bytes_read() - before)
    size = (tmp_path / "a.jsonl").stat().st_size
    assert read[2] < 1.1 * read[1]
    assert read[2] < size / 2


def bytes_read() -> int:
    """What this process has read so far, from files and everything else."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.parametrize("count", [40, 1500])
def test_json_has_what_is_said(tmp_path: Path, byte_tokenizer: Path, count: int) -> None:
    """One object on standard output, of the numbers that the lines say."""
    write_jsonl(tmp_path / "a.jsonl", documents(count))
    words = ["-i", tmp_path / "a.jsonl", "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain"]
    shown = raw2ids(*words, "--dry_run").stdout
    found = json.loads(raw2ids(*words, "--dry_run", "--json").stdout)
    assert not (tmp_path / "out").exists()
    assert numbers(shown, r"bad records: (\d+) of the first ([\d,]+)") == [
        found["bad_records"]["bad"],
        found["bad_records"]["records"],
    ]
    said = numbers(shown, r"([\d,]+) documents, ([\d,]+) tokens, ([\d,]+) trained in ([\d,]+) rows")
    assert said == [found["sample"][name] for name in ("documents", "tokens", "trained", "rows")]
    assert numbers(shown, r"the whole input: (?:about )?([\d,]+) tokens") == [found["whole_input"]["tokens"]]
    assert found["whole_input"]["is_estimate"] == (count > 1000)
    assert found["differs"].keys() == {"input", "output", "tokenizer", "type"}
    assert found["options"]["max_len"]
    assert len(found["rows"]) == min(3, found["sample"]["rows"])


def test_json_is_of_a_dry_run(tmp_path: Path, byte_tokenizer: Path) -> None:
    refused = raw2ids("-i", tmp_path, "-o", tmp_path / "o", "--tokenizer", byte_tokenizer, "--json", check=False)
    assert refused.returncode == 2
    assert "--json prints what --dry_run finds" in refused.stderr
