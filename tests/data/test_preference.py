"""`raw2ids -t preference`: pairs packed whole, whatever comes in; and every command keeps them so."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from jllm.commands.inspect import main as inspect
from jllm.commands.repartition import main as repartition
from jllm.commands.shuffle_datasets import main as shuffle
from jllm.data.dataset.manifest import PREFERENCE, open_data_set
from jllm.data.dataset.shards import ShardReader
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.errors import UserError
from tests.data.pairs import Pair, pairs_of_row, write_records
from tests.data.raw2ids_runs import finished_files, raw2ids, tree

SIZE = int(os.environ.get("JLLM_TEST_SIZE", "1"))
WORDS = ("alpha", "beta", "gamma", "delta", "naïve", "日本語", "def f(x):")


def records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)

    def text(least: int, most: int) -> str:
        return " ".join(random.choice(WORDS, int(random.integers(least, most))))

    return [
        {"prompt": f"{number} {text(1, 9)}", "chosen": f"yes {text(1, 20)}", "rejected": f"no {text(1, 20)}"}
        for number in range(count)
    ]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in open_data_set(folder).paths for batch in ShardReader(path) for row in batch.to_pylist()]


def pairs_of(folder: Path) -> list[Pair]:
    return [pair for row in rows_of(folder) for pair in pairs_of_row(row)]


def make(tmp_path: Path, tokenizer: Path, given: list[Any], *more: object, name: str = "out") -> Path:
    source = write_records(tmp_path / f"{name}.jsonl", given)
    arguments = ("-i", source, "-o", tmp_path / name, "--tokenizer", tokenizer, "--chat_template", "chatml")
    raw2ids(*arguments, "-t", "preference", "--cores", 1, *more)
    return tmp_path / name


def test_every_pair_comes_out_whole(tmp_path: Path, byte_tokenizer: Path) -> None:
    """Each in one row, with the prompt on both sides and the answers trained, as the chat path makes them."""
    given = records(60)
    out = make(tmp_path, byte_tokenizer, given, "--max_len", 512)
    sides = {}
    for side in ("chosen", "rejected"):
        chats = [[{"user": each["prompt"]}, {"assistant": each[side]}] for each in given]
        source = write_records(tmp_path / f"{side}.jsonl", chats)
        raw2ids("-i", source, "-o", tmp_path / side, "--tokenizer", byte_tokenizer, "--chat_template", "chatml",
                "--max_len", 512, "--cores", 1)  # fmt: skip
        sides[side] = rows_of(tmp_path / side)
    wanted = []
    for chosen, rejected in zip(sides["chosen"], sides["rejected"], strict=True):
        [asked] = {next(i for i, label in enumerate(row["labels"]) if label != -100) for row in (chosen, rejected)}
        wanted.append((chosen["input_ids"][:asked], chosen["input_ids"][asked:], rejected["input_ids"][asked:]))
    found = pairs_of(out)
    assert sorted(found) == sorted(wanted)
    rows = rows_of(out)
    assert len(rows) < 60
    assert max(len(row["input_ids"]) for row in rows) <= 512
    manifest = open_data_set(out).manifest
    assert manifest.kind == PREFERENCE
    assert manifest.extra["documents"] == 60
    assert manifest.total("trained_tokens") == sum(len(chosen) + len(rejected) - 2 for _, chosen, rejected in found), (
        "all but the line end behind each answer"
    )


def test_what_is_too_long_is_dropped_or_named(tmp_path: Path, byte_tokenizer: Path) -> None:
    long = {"prompt": "p", "chosen": "zq7 " * 400, "rejected": "b"}
    given = [*records(5), long]
    source = write_records(tmp_path / "x.jsonl", given)
    common = ("-i", source, "--tokenizer", byte_tokenizer, "--chat_template", "chatml", "-t", "preference",
              "--max_len", 512, "--cores", 1)  # fmt: skip
    said = raw2ids(*common, "-o", tmp_path / "a").stdout
    assert "dropped 1 preference pairs longer than 512 tokens" in said
    assert "pairs 5 with" in said
    assert "chosen conversations 6: half up to" in said
    assert "rejected conversations 6: half up to" in said
    assert len(pairs_of(tmp_path / "a")) == 5
    end = raw2ids(*common, "-o", tmp_path / "b", "--overlong", "error", check=False)
    assert end.returncode == 2
    assert "--overlong error: the preference pair at x.jsonl:6 has" in end.stderr
    assert "--overlong split: a preference pair is never split" in raw2ids(
        *common, "-o", tmp_path / "b", "--overlong", "split", check=False
    ).stderr  # fmt: skip


def test_bad_pairs_are_counted_by_name(tmp_path: Path, byte_tokenizer: Path) -> None:
    bad = [{"prompt": "p", "chosen": "a", "rejected": "a"}, {"prompt": "p", "chosen": "", "rejected": "a"},
           {"prompt": "p", "completion": "a", "label": True}]  # fmt: skip
    out = make(tmp_path, byte_tokenizer, [*records(4), *bad], "--on_error", "skip")
    found = open_data_set(out).manifest.extra["bad_records"]
    assert {kind: each["count"] for kind, each in found.items()} == {
        "identical pair": 1, "empty answer": 1, "unpaired answer": 1,
    }  # fmt: skip
    source = write_records(tmp_path / "kto.jsonl", bad[2:] * 3)
    end = raw2ids("-i", source, "-o", tmp_path / "kto", "--tokenizer", byte_tokenizer, "-t", "preference",
                  "--chat_template", "chatml", check=False)  # fmt: skip
    assert end.returncode == 2
    assert "unpaired answer" in end.stderr
    assert "one judged answer (prompt, completion, label)" in end.stderr


def test_field_map_and_json_list(tmp_path: Path, byte_tokenizer: Path) -> None:
    given = [{"q": each["prompt"], "a": [{"text": each["chosen"]}, {"text": each["rejected"]}]} for each in records(9)]
    (tmp_path / "m.json").write_text(json.dumps(given))
    common = ("-i", tmp_path / "m.json", "--tokenizer", byte_tokenizer, "--chat_template", "chatml",
              "-t", "preference", "--cores", 1)  # fmt: skip
    raw2ids(*common, "-o", tmp_path / "m", "--field_map", "prompt=q,chosen=a.0.text,rejected=a.1.text")
    assert sorted(pairs_of(tmp_path / "m")) == sorted(pairs_of(make(tmp_path, byte_tokenizer, records(9))))
    end = raw2ids(*common, "-o", tmp_path / "n", "--field_map", "prompt=q", check=False)
    assert "name both fields" in end.stderr


def test_held_out_pairs_are_whole(tmp_path: Path, byte_tokenizer: Path) -> None:
    out = make(tmp_path, byte_tokenizer, records(80), "--eval_fraction", 0.2, "--max_len", 300)
    held = pairs_of(tmp_path / "_eval" / "out")
    whole = pairs_of(make(tmp_path, byte_tokenizer, records(80), "--max_len", 300, name="whole"))
    assert 5 < len(held) < 30
    assert sorted(held + pairs_of(out)) == sorted(whole)
    assert open_data_set(tmp_path / "_eval" / "out").manifest.kind == PREFERENCE


def test_workers_and_padding_leave_no_trace_in_pairs(tmp_path: Path, byte_tokenizer: Path) -> None:
    one = make(tmp_path, byte_tokenizer, records(40), "--max_len", 300, "--pad")
    two = make(tmp_path, byte_tokenizer, records(40), "--max_len", 300, "--pad", "--cores", 2, name="two")
    rows = rows_of(one)
    assert {len(row["input_ids"]) for row in rows} == {300}
    assert rows_of(two) == rows
    assert any(row["cu_seqlens"][-1] < 300 for row in rows)
    assert len(pairs_of(one)) == 40


def test_splits_and_runs_are_the_same_to_the_byte(tmp_path: Path, byte_tokenizer: Path) -> None:
    source = write_records(tmp_path / "x.jsonl", records(200))
    common = ("-i", source, "--tokenizer", byte_tokenizer, "--chat_template", "chatml", "-t", "preference",
              "--max_len", 300, "-n", 60, "--cores", 1)  # fmt: skip
    raw2ids(*common, "-o", tmp_path / "whole")
    wanted = tree(tmp_path / "whole")
    raw2ids(*common, "-o", tmp_path / "out")
    assert finished_files(tmp_path / "out")
    assert tree(tmp_path / "out") == wanted


def test_options_that_do_not_fit() -> None:
    for more, said in (
        ({"format": "messages"}, "--format messages"),
        ({"train_on_prompt": True}, "--train_on_prompt"),
        ({"filter": True}, "--filter"),
        ({"stack": True}, "--stack"),
        ({"input_format": "ids"}, "--input_format ids"),
        ({"control_class": ("*=1",)}, "--control_class"),
    ):
        with pytest.raises(UserError, match=said):
            Raw2IdsConfig(input=("x",), tokenizer="t", type="preference", **more)  # type: ignore[arg-type]


def run(command: Any, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_shuffled_mixed_and_repartitioned_pairs_stay_whole(tmp_path: Path, byte_tokenizer: Path) -> None:
    (tmp_path / "sets").mkdir()
    for name, seed in (("a", 1), ("b", 2)):
        out = make(tmp_path, byte_tokenizer, records(30, seed), "--max_len", 200, name=name)
        out.rename(tmp_path / "sets" / name)
    wanted = sorted(pairs_of(tmp_path / "sets" / "a") + pairs_of(tmp_path / "sets" / "b"))
    run(shuffle, "-d", tmp_path / "sets", "-o", tmp_path / "sf", "-n", 3)
    for name in ("a", "b"):
        assert open_data_set(tmp_path / "sf" / f"{name}-00000").manifest.kind == PREFERENCE
    run(shuffle, "-d", tmp_path / "sets", "-o", tmp_path / "mixed", "-n", 2, "--mix", "a=2.5", "--mix", "b=1")
    mixed = pairs_of(tmp_path / "mixed" / "a-00000")
    assert set(map(str, mixed)) == set(map(str, pairs_of(tmp_path / "sets" / "a")))
    assert len(mixed) > 2 * len(set(map(str, mixed)))
    run(repartition, "-d", tmp_path / "sf", "-n", 2)
    assert sorted(pairs_of(tmp_path / "sf")) == wanted
    assert open_data_set(tmp_path / "sf").manifest.kind == PREFERENCE
    chats = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    source = write_records(tmp_path / "chat.jsonl", chats)
    raw2ids("-i", source, "-o", tmp_path / "sets" / "c", "--tokenizer", byte_tokenizer, "--chat_template", "chatml")
    run(shuffle, "-d", tmp_path / "sets", "-o", tmp_path / "sf2", "-n", 2)
    end = CliRunner().invoke(repartition, ["-d", str(tmp_path / "sf2"), "-n", "2"])
    assert end.exit_code == 2
    assert "preference pairs" in end.output


def test_inspect_shows_pairs_side_by_side(tmp_path: Path, byte_tokenizer: Path) -> None:
    given = [{"prompt": "how?", "chosen": "like this\nand so", "rejected": "no"}]
    out = make(tmp_path, byte_tokenizer, given)
    said = run(inspect, out, "-n", 1, "--tokenizer", byte_tokenizer)
    assert "rows of preference pairs in" in said
    lines = said.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("chosen: "))
    assert "| rejected: " in lines[head]
    left, _, right = lines[head + 1].partition(" | ")
    assert left.rstrip() == "like this"
    assert right.startswith("no")
    assert any("how?" in line for line in lines[:head])
    assert lines[head + 2].startswith("and so")


def test_dry_run_shows_pairs(tmp_path: Path, byte_tokenizer: Path) -> None:
    source = write_records(tmp_path / "x.jsonl", records(5))
    said = raw2ids("-i", source, "-o", tmp_path / "o", "--tokenizer", byte_tokenizer, "--chat_template", "chatml",
                   "-t", "preference", "--dry_run").stdout  # fmt: skip
    assert "format: preference pairs" in said
    assert "5 pairs," in said
    assert "| rejected: " in said
    assert not (tmp_path / "o").exists()
