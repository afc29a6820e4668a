"""raw2ids from the command line: what comes out, whatever goes in and whoever kills it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jllm.data.chat.builtin_templates import TEMPLATES
from jllm.data.dataset.manifest import read_manifest
from jllm.data.dataset.shards import CU_SEQLENS
from jllm.data.prepare.encoding import pretrain_affixes
from jllm.data.tokenizer import early
from jllm.data.tokenizer.early import EarlyEngines
from jllm.data.tokenizer.facts import load_tokenizer
from tests.data.chats import END_OUTSIDE
from tests.data.raw2ids_runs import (
    documents,
    finished_files,
    raw2ids,
    reference_stream,
    rows_of,
    stacked,
    tree,
    write_jsonl,
)


def test_stacked_rows_are_the_definition(tmp_path: Path, byte_tokenizer: Path) -> None:
    texts = documents(300)
    source = write_jsonl(tmp_path / "some.jsonl", texts)
    out = tmp_path / "out"
    raw2ids("-i", source, "-o", out, "--tokenizer", byte_tokenizer, "-t", "pretrain", "--stack", "--max_len", 65,
            "-n", 110, "--batch_size", 20)  # fmt: skip
    manifest = read_manifest(out)
    assert manifest is not None
    streams = reference_stream(byte_tokenizer, texts)
    rows, boundaries = [], []
    for start in range(0, 300, 110):
        split_rows, split_boundaries = stacked(streams[start : start + 110], 65)
        rows += split_rows
        boundaries += split_boundaries
    assert rows_of(out) == rows
    assert rows_of(out, CU_SEQLENS) == boundaries
    tokens = sum(map(len, streams))
    assert manifest.extra["documents"] == 300
    assert manifest.extra["document_tokens"] == tokens
    assert manifest.total("trained_tokens") == tokens - 300
    assert manifest.total("tokens") == sum(map(len, rows))
    assert {entry.path.split("/")[0] for entry in manifest.files} == {"some-00000", "some-00001", "some-00002"}
    assert manifest.files[0].path == "some-00000/some-00000-00000.zstd.parquet"
    assert all(entry.rows <= 20 for entry in manifest.files)
    assert not (out / ".raw2ids").exists()


def test_engines_are_begun_at_once_for_a_new_data_set(
    tmp_path: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not where the run may need none of them, or is a mistake."""
    begun: list[EarlyEngines | None] = []
    begin = early.begun_at_once

    def watched(name: str, *, inert: bool) -> EarlyEngines | None:
        begun.append(begin(name, inert=inert))
        return begun[-1]

    monkeypatch.setattr(early, "begun_at_once", watched)
    load_tokenizer(str(byte_tokenizer))
    source = write_jsonl(tmp_path / "some.jsonl", documents(20))
    words = ["-i", source, "--tokenizer", byte_tokenizer, "-t", "pretrain"]
    raw2ids(*words, "-o", tmp_path / "out")
    raw2ids(*words, "-o", tmp_path / "out", "-C")
    assert len(begun) == 2
    assert None not in begun
    raw2ids(*words, "-o", tmp_path / "out")
    raw2ids(*words, "-o", tmp_path / "other", "--engine", "hf")
    raw2ids("-i", tmp_path / "missing.jsonl", *words[2:], "-o", tmp_path / "none", check=False)
    assert len(begun) == 2
    assert (tmp_path / "out/some-00000/some-00000-00000.zstd.parquet").read_bytes() == (
        tmp_path / "other/some-00000/some-00000-00000.zstd.parquet"
    ).read_bytes()


def test_the_manifest_records_what_checks_need(tmp_path: Path, byte_tokenizer: Path) -> None:
    source = write_jsonl(tmp_path / "some.jsonl", documents(20))
    facts = load_tokenizer(str(byte_tokenizer))
    own = pretrain_affixes(facts)[1][-1]
    for more, end in (([], own), (["--doc_suffix", "[5,7]"], 7), (["--doc_suffix", ""], None)):
        out = tmp_path / f"out-{end}"
        raw2ids("-i", source, "-o", out, "--tokenizer", byte_tokenizer, "-t", "pretrain", *more)
        written = json.loads((out / "_manifest.json").read_text())
        assert written["tokenizer"].get("document_end") == end
        assert written["tokenizer"]["vocabulary_sha256"] == facts.vocabulary_sha256
        probes = written["tokenizer"]["probe_ids"]
        assert len(probes) >= 30
        assert all(
            tuple(probes[text]) == ids
            for text, ids in zip(facts.probes, facts.probe_ids, strict=True)
            if text in probes
        )
        assert written["labels_checked"] is True
        assert written["largest_id"] == max(max(row) for row in rows_of(out))
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    raw2ids("-i", chat, "-o", tmp_path / "chat", "--tokenizer", byte_tokenizer, "--chat_template", "chatml")
    manifest = read_manifest(tmp_path / "chat")
    assert manifest is not None
    assert manifest.chat_template == TEMPLATES["chatml"]


def test_text_and_jsonl_give_the_same_rows(tmp_path: Path, byte_tokenizer: Path) -> None:
    texts = documents(50, seed=1)
    (tmp_path / "a.txt").write_text("\n\n" + "\n \t\n\n".join(texts) + "\n\n\n", encoding="utf-8")
    write_jsonl(tmp_path / "b.jsonl", texts)
    for name in ("a.txt", "b.jsonl"):
        raw2ids("-i", tmp_path / name, "-o", tmp_path / f"{name}.out", "--tokenizer", byte_tokenizer, "-t", "pretrain",
                "--stack", "--max_len", 33)  # fmt: skip
    assert rows_of(tmp_path / "a.txt.out") == rows_of(tmp_path / "b.jsonl.out")
    end = reference_stream(byte_tokenizer, [""])[0][0]
    manifest = read_manifest(tmp_path / "a.txt.out")
    assert manifest is not None
    assert manifest.extra["documents"] == 50
    stream = [row[1:] if i else row for i, row in enumerate(rows_of(tmp_path / "a.txt.out"))]
    assert sum(row.count(end) for row in stream) == 50


def test_same_bytes_for_any_number_of_cores(tmp_path: Path, byte_tokenizer: Path) -> None:
    source = write_jsonl(tmp_path / "some.jsonl", documents(2000, seed=2))
    for cores in (1, 2, 5):
        raw2ids("-i", source, "-o", tmp_path / str(cores), "--tokenizer", byte_tokenizer, "-t", "pretrain", "--stack",
                "--max_len", 129, "--cores", cores, own_process=True)  # fmt: skip
    assert tree(tmp_path / "1") == tree(tmp_path / "2") == tree(tmp_path / "5")


def test_documents_alone_in_windows(tmp_path: Path, byte_tokenizer: Path) -> None:
    texts = documents(40, seed=3, longest=80)
    source = write_jsonl(tmp_path / "some.jsonl", texts)
    raw2ids("-i", source, "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain", "--max_len", 50)
    wanted = []
    for ids in reference_stream(byte_tokenizer, texts):
        wanted += [ids[begin : begin + 50] for begin in range(0, max(1, len(ids) - 1), 49)]
    assert rows_of(tmp_path / "out") == wanted


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("\n\n \n", "is empty"),
        ("{}\n", "none of its 1 records"),
        ('{"text": " "}\n{bad\n', "none of its 2 records"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--eval_fraction", 0.5], ["-C"]], ids=["plain", "eval", "clean"])
def test_inputs_without_documents(
    tmp_path: Path, byte_tokenizer: Path, content: str, said: str, more: list[object]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "empty.jsonl").write_text(content)
    words = ["-i", tmp_path / "in", "-o", tmp_path / "deep" / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain"]
    result = raw2ids(*words, *more, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: -i {tmp_path / 'in'}: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in"], "nothing is left behind"
    write_jsonl(tmp_path / "in" / "full.jsonl", ["one"])
    raw2ids(*words, "--on_error", "skip")
    assert rows_of(tmp_path / "deep" / "out") == reference_stream(byte_tokenizer, ["one"])


def test_rows_that_options_leave_out(tmp_path: Path, byte_tokenizer: Path) -> None:
    source = write_jsonl(tmp_path / "some.jsonl", ["short"])
    words = ["-i", source, "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain"]
    for more, said in ((["--stack", "--drop_tails"], "--drop_tails"), (["--max_tokens", 1], "--max_tokens")):
        result = raw2ids(*words, *more, check=False)
        assert result.returncode == 2
        assert said in result.stderr
        assert not (tmp_path / "out").exists()


def test_a_mistake_leaves_nothing_and_removes_nothing(tmp_path: Path, byte_tokenizer: Path) -> None:
    source = write_jsonl(tmp_path / "some.jsonl", documents(30))
    (tmp_path / "empty").mkdir()
    words = ["-i", source, "-o", tmp_path / "deep" / "out", "-t", "pretrain", "--eval_fraction", 0.5]
    assert raw2ids(*words, "--tokenizer", tmp_path / "empty", check=False).returncode == 2
    assert not (tmp_path / "deep").exists()
    raw2ids(*words, "--tokenizer", byte_tokenizer)
    before = tree(tmp_path)
    for wrong in (
        ["--tokenizer", tmp_path / "empty", "-C"],
        ["--tokenizer", byte_tokenizer, "-C", "-t", "ft", "--chat_template", "nowhere"],
        ["--tokenizer", byte_tokenizer, "--max_len", 7],
    ):
        assert raw2ids(*words, *wrong, check=False).returncode == 2
        assert tree(tmp_path) == before


def test_finished_is_left_alone_and_changes_are_noticed(tmp_path: Path, byte_tokenizer: Path) -> None:
    source = write_jsonl(tmp_path / "some.jsonl", documents(30))
    arguments = ["-i", source, "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain", "--stack"]
    raw2ids(*arguments)
    before = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*")}
    assert "finished" in raw2ids(*arguments, "--cores", 1).stdout
    assert before == {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*")}
    changed = raw2ids(*arguments, "--max_len", 100, check=False)
    assert changed.returncode == 2
    assert "max_len" in changed.stderr
    assert "-C" in changed.stderr
    raw2ids(*arguments, "--max_len", 100, "-C")
    write_jsonl(source, documents(31))
    changed = raw2ids(*arguments, "--max_len", 100, check=False)
    assert changed.returncode == 2
    assert "some.jsonl" in changed.stderr


def test_clean_keeps_what_is_not_ours(tmp_path: Path, byte_tokenizer: Path) -> None:
    source = write_jsonl(tmp_path / "some.jsonl", documents(30))
    out = tmp_path / "out"
    arguments = ["-i", source, "-o", out, "--tokenizer", byte_tokenizer, "-t", "pretrain", "--stack"]
    raw2ids(*arguments, "-n", 10)
    (out / "notes.txt").write_text("mine")
    raw2ids(*arguments, "-C")
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["some-00000"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "theirs.parquet").write_bytes(b"PAR1")
    refused = raw2ids("-i", source, "-o", other, "--tokenizer", byte_tokenizer, "-t", "pretrain", check=False)
    assert refused.returncode == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-i", "nowhere.jsonl", "--tokenizer", "TOKENIZER", "-t", "pretrain"], "nowhere.jsonl"),
        (["-i", "INPUT", "--tokenizer", "./nowhere", "-t", "pretrain"], "./nowhere"),
        (["-i", "INPUT", "--tokenizer", "TOKENIZER", "-t", "pretain"], "pretain"),
        (["-i", "INPUT", "--tokenizer", "TOKENIZER", "-t", "pretrain", "--max_len", "1"], "--max_len 1"),
        (["-i", "INPUT", "--tokenizer", "TOKENIZER", "-t", "pretrain", "-c", "zip"], "zip"),
        (["-i", "INPUT", "--tokenizer", "TOKENIZER", "-t", "pretrain", "--cores", "0"], "--cores 0"),
        (["-i", "INPUT", "--tokenizer", "EMPTY", "-t", "pretrain"], "--tokenizer"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, byte_tokenizer: Path, arguments: list[str], said: str) -> None:
    source = write_jsonl(tmp_path / "some.jsonl", documents(3))
    (tmp_path / "empty").mkdir()
    places = {"INPUT": source, "TOKENIZER": byte_tokenizer, "EMPTY": tmp_path / "empty"}
    result = raw2ids("-o", tmp_path / "out", *[places.get(item, item) for item in arguments], check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom jllm.raw2ids import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'numpy', 'pyarrow', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert result.stdout.endswith("[]\n")


def test_a_full_disk_is_one_line(tmp_path: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jllm.data.prepare.config import Raw2IdsConfig
    from jllm.data.prepare.run import prepare
    from jllm.data.prepare.saving import writer
    from jllm.errors import UserError

    source = write_jsonl(tmp_path / "some.jsonl", documents(300))
    config = Raw2IdsConfig(
        input=(str(source),), tokenizer=str(byte_tokenizer), type="pretrain", stack=True, max_len=65, num=100,
        output=tmp_path / "out", quiet=True,
    )  # fmt: skip
    append = writer.ShardWriter.append

    def full(self: writer.ShardWriter, *group: Any) -> None:
        if self.path.name.startswith("some-00001"):
            raise OSError(28, "No space left on device")
        append(self, *group)

    monkeypatch.setattr(writer.ShardWriter, "append", full)
    with pytest.raises(UserError, match="disk is full"):
        prepare(config)
    assert len(finished_files(tmp_path / "out")) == 1
    monkeypatch.setattr(writer.ShardWriter, "append", append)
    kept = finished_files(tmp_path / "out")
    prepare(config)
    assert kept.items() <= finished_files(tmp_path / "out").items()


def test_chat_from_the_command_line(tmp_path: Path, byte_tokenizer: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [[{"user": f"q{i}"}, {"assistant": " ".join(["word"] * int(rng.integers(1, 60)))}] for i in range(200)]
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["-i", source, "--tokenizer", byte_tokenizer, "--chat_template", "chatml", "--max_len", 48]
    for cores in (1, 2):
        raw2ids(*arguments, "-o", tmp_path / str(cores), "--cores", cores)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")
    result = raw2ids(*arguments, "-o", tmp_path / "packed", "--packing", "best_fit", "--pad", "--debug", 2)
    assert result.stdout.count("--- row") == 2
    plain, packed = (json.loads((tmp_path / name / "_manifest.json").read_text()) for name in ("1", "packed"))
    assert plain["trained_tokens"] == packed["trained_tokens"]
    assert packed["rows"] < plain["rows"]
    assert plain["chat"]["warnings"] == []
    outside = tmp_path / "outside.jinja"
    outside.write_text(END_OUTSIDE)
    warned = raw2ids(*arguments, "--chat_template", outside, "-o", tmp_path / "outside")
    assert warned.stderr.count("warning: ") == 1
    noted = json.loads((tmp_path / "outside" / "_manifest.json").read_text())
    assert "<|im_end|>" in noted["chat"]["warnings"][0]
    missing = raw2ids("-i", source, "--tokenizer", byte_tokenizer, "-o", tmp_path / "no", check=False)
    assert missing.returncode == 2
    assert "--chat_template" in missing.stderr


def piped(data: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jllm.raw2ids", "-i", "-", *map(str, words)]
    return subprocess.run(command, input=data, capture_output=True, text=True, timeout=120)


def test_standard_input_is_never_finished_earlier_nor_gone_on_with(tmp_path: Path, byte_tokenizer: Path) -> None:
    words = ["-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain"]
    first = '{"text": "first"}\n' + '{"text": null}\n' * 30
    assert piped(first, *words).returncode == 2  # too many bad records; what was made stays
    assert (tmp_path / "out" / ".raw2ids").is_dir()
    second = piped('{"text": "second"}\n', *words)
    assert second.returncode == 0, second.stderr
    assert rows_of(tmp_path / "out") == reference_stream(byte_tokenizer, ["second"])
    before = tree(tmp_path / "out")
    third = piped('{"text": "third"}\n', *words)
    assert third.returncode == 2
    assert "may be other data; start over with -C" in third.stderr
    assert tree(tmp_path / "out") == before
    assert piped('{"text": "third"}\n', *words, "-C").returncode == 0
    assert rows_of(tmp_path / "out") == reference_stream(byte_tokenizer, ["third"])


def test_a_pipe_is_read_like_standard_input(tmp_path: Path, byte_tokenizer: Path) -> None:
    script = (
        f'{sys.executable} -m jllm.raw2ids -i <(echo \'{{"text": "one"}}\') --input_format jsonl -t pretrain'
        f" -o {tmp_path}/out --tokenizer {byte_tokenizer}"
    )
    subprocess.run(["bash", "-c", script], check=True, capture_output=True, timeout=120)
    assert rows_of(tmp_path / "out") == reference_stream(byte_tokenizer, ["one"])


def test_what_nothing_can_be_made_of_is_dropped_though_too_many_are_bad(tmp_path: Path, byte_tokenizer: Path) -> None:
    """Twelve bad records and no other: what the message says is true of a second run too."""
    (tmp_path / "a.jsonl").write_text('{"text": null}\n' * 12)
    words = ["-i", tmp_path / "a.jsonl", "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain"]
    for _ in range(2):
        result = raw2ids(*words, check=False)
        assert result.returncode == 2
        assert "none of its 12 records can be used" in result.stderr
        assert '"text" is null' in result.stderr
        assert not (tmp_path / "out").exists()


def test_an_input_that_changes_during_a_run_is_refused(
    tmp_path: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jllm.data.prepare import run

    source = write_jsonl(tmp_path / "some.jsonl", documents(30))
    convert = run.convert

    def changed(*arguments: object) -> object:
        totals = convert(*arguments)  # type: ignore[arg-type]
        write_jsonl(source, documents(31))
        return totals

    monkeypatch.setattr(run, "convert", changed)
    words = ["-i", source, "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain"]
    result = raw2ids(*words, check=False)
    assert result.returncode == 2
    assert "was changed while it was read" in result.stderr
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    raw2ids(*words)


def test_mistakes_in_format_and_fields_do_not_wait_for_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jsonl").write_text('{"some": "thing"}\n')
    words = ["-i", tmp_path / "a.jsonl", "-o", tmp_path / "out", "--tokenizer", tmp_path / "empty"]
    for more, said in (
        (["--field_map", "user"], "--field_map user: write role=field"),
        (["--date", "yesterday"], "--date yesterday: write it as 2026-01-31"),
        (["--format", "alpaca", "--field_map", "user=a,assistant=b"], "--format alpaca: not together with --field_map"),
        ([], "look like no known chat format"),
    ):
        result = raw2ids(*words, *more, check=False)
        assert result.returncode == 2
        assert said in result.stderr
        assert not (tmp_path / "out").exists()


def test_a_broken_file_of_a_tokenizer_is_named(tmp_path: Path, byte_tokenizer: Path) -> None:
    (tmp_path / "tok").mkdir()
    for path in byte_tokenizer.iterdir():
        (tmp_path / "tok" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tok" / "tokenizer_config.json").write_text('{"eos')
    source = write_jsonl(tmp_path / "some.jsonl", ["text"])
    result = raw2ids(
        "-i", source, "-o", tmp_path / "out", "--tokenizer", tmp_path / "tok", "-t", "pretrain", check=False
    )
    assert result.returncode == 2
    assert "tokenizer_config.json: not valid JSON" in result.stderr


def test_an_output_in_the_input_is_refused_before_anything_is_removed(tmp_path: Path, byte_tokenizer: Path) -> None:
    write_jsonl(tmp_path / "some.jsonl", ["text"])
    words = ["--tokenizer", byte_tokenizer, "-t", "pretrain"]
    raw2ids("-i", tmp_path / "some.jsonl", "-o", tmp_path / "in" / "out", *words)
    write_jsonl(tmp_path / "in" / "a.jsonl", ["text"])
    before = tree(tmp_path)
    for out in ("in", "in/out", "in/../in/new", "in/deep/out"):
        result = raw2ids("-i", tmp_path / "in", "-o", tmp_path / out, *words, "-C", check=False)
        assert result.returncode == 2
        assert "lies in the input folder" in result.stderr
    shard = next((tmp_path / "in" / "out").rglob("*.parquet"))
    result = raw2ids("-i", shard, "-o", tmp_path / "in" / "out", *words, "-C", check=False)
    assert "lies in it; give another folder" in result.stderr
    assert tree(tmp_path) == before
