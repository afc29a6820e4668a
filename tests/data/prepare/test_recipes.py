"""Options turned into encoders and packers: what they do to the rows."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from jllm.data.chat.builtin_templates import TEMPLATES
from jllm.data.dataset.manifest import read_manifest
from jllm.data.dataset.shards import IGNORE_INDEX, LABELS
from jllm.data.packing.best_fit import BestFitPacker
from jllm.data.packing.conversations import ConversationPacker
from jllm.data.packing.packers import StackPacker, WindowPacker
from jllm.data.prepare import recipes
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.sources.inputs import resolve
from jllm.data.tokenizer.checked_engine import open_engine
from jllm.data.tokenizer.facts import load_tokenizer
from jllm.errors import UserError
from tests.data.raw2ids_runs import documents, raw2ids, reference_stream, rows_of, write_jsonl


@pytest.mark.parametrize(
    "rows", [["--stack", "--max_len", 33], ["--packing", "best_fit"], []], ids=["stack", "best_fit", "alone"]
)
def test_masked_are_the_special_tokens_and_no_others(tmp_path: Path, byte_tokenizer: Path, rows: list[object]) -> None:
    texts = [f"{text}<|endoftext|> more<|im_start|><think> x" for text in documents(30)]
    source = write_jsonl(tmp_path / "some.jsonl", texts)
    arguments = ["-i", source, "--tokenizer", byte_tokenizer, "-t", "pretrain", "--parse_special", *rows]
    raw2ids(*arguments, "-o", tmp_path / "plain")
    raw2ids(*arguments, "-o", tmp_path / "masked", "--mask_tokens")
    added = json.loads((byte_tokenizer / "tokenizer.json").read_text())["added_tokens"]
    special = {token["id"] for token in added if token["special"]}
    assert special < {token["id"] for token in added}, "added tokens that are not special stay trained"
    plain, ids, labels = rows_of(tmp_path / "plain"), rows_of(tmp_path / "masked"), rows_of(tmp_path / "masked", LABELS)
    assert ids == plain
    assert labels == [[IGNORE_INDEX if index in special else index for index in row] for row in ids]
    masked = sum(label == IGNORE_INDEX for row in labels for label in row)
    assert masked >= 3 * len(texts)
    manifests = [read_manifest(tmp_path / name) for name in ("plain", "masked")]
    trained = [manifest.total("trained_tokens") or 0 for manifest in manifests if manifest is not None]
    shared = len(ids) if "--stack" in rows else 0  # a row's first token is no target, and may be masked
    assert masked - shared <= trained[0] - trained[1] <= masked


@pytest.mark.parametrize("length", [64, 65])
def test_half_the_stride_doubles_the_tokens(tmp_path: Path, byte_tokenizer: Path, length: int) -> None:
    texts = [" ".join(documents(60, longest=40)), "short"]
    source = write_jsonl(tmp_path / "some.jsonl", texts)
    long, short = reference_stream(byte_tokenizer, texts)
    stride = length // 2
    words = ["-i", source, "--tokenizer", byte_tokenizer, "-t", "pretrain", "--max_len", length, "--stride", stride]
    raw2ids(*words, "-o", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert rows.pop() == short
    assert rows == [long[begin : begin + length] for begin in range(0, len(long) - length + stride, stride)]
    total = sum(map(len, rows))
    assert abs(total - len(long) * length / stride) <= length + 1
    assert total > 1.8 * len(long)


def config(**values: Any) -> Raw2IdsConfig:
    return Raw2IdsConfig(**{"input": ("x",), "tokenizer": "y", **values})


def test_text_an_id_or_ids(byte_tokenizer: Path) -> None:
    facts = load_tokenizer(str(byte_tokenizer))
    engine = open_engine(facts)
    of_token = {token["content"]: token["id"] for token in facts.added}
    for value, wanted in (("", ()), ("5", (5,)), ("[1, 2]", (1, 2)), ("<|im_end|>", (of_token["<|im_end|>"],))):
        assert recipes.ids_of(value, "doc_prefix", engine, facts) == wanted
    for value in ("100000", "[1, 100000]"):
        with pytest.raises(UserError, match="id 100000 is beyond the vocabulary"):
            recipes.ids_of(value, "doc_prefix", engine, facts)
    own = (facts.prefix, (of_token["<|endoftext|>"],))
    assert recipes.affixes_of(config(type="pretrain"), facts, engine) == own
    assert recipes.affixes_of(config(type="pretrain", doc_prefix="3"), facts, engine) == ((3,), own[1])
    assert recipes.affixes_of(config(type="pretrain", doc_suffix=""), facts, engine) == ((), ())


@pytest.mark.parametrize(
    ("values", "kind", "columns"),
    [
        ({"type": "pretrain"}, WindowPacker, ("input_ids",)),
        ({"type": "pretrain", "mask_tokens": True}, WindowPacker, ("input_ids", "labels")),
        ({"type": "pretrain", "stack": True}, StackPacker, ("input_ids", "cu_seqlens")),
        ({"type": "pretrain", "packing": "best_fit"}, BestFitPacker, ("input_ids", "cu_seqlens")),
        ({"packing": "best_fit"}, BestFitPacker, ("input_ids", "labels", "cu_seqlens")),
        ({}, ConversationPacker, ("input_ids", "labels")),
        ({"pad": True}, ConversationPacker, ("input_ids", "labels", "cu_seqlens")),
    ],
)
def test_the_packer_of_the_options(
    byte_tokenizer: Path, values: dict[str, Any], kind: type, columns: tuple[str, ...]
) -> None:
    packer = recipes.packer_of(config(**values), load_tokenizer(str(byte_tokenizer)))
    assert type(packer) is kind
    assert packer.columns == columns


WORDS = st.text("0123456789-+.ax\u00b2 ", max_size=6)
ITEMS = st.one_of(
    st.integers(-(10**30), 10**30).map(str),
    st.text("0123456789-+.ax\u00b2 ", max_size=6),
    st.sampled_from(["", "INST"]),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@hypothesis.given(items=st.lists(ITEMS, min_size=1, max_size=4), brackets=st.booleans())
def test_ids_are_ids_of_the_tokenizer_or_refused_and_all_else_is_text(
    byte_tokenizer: Path, items: list[str], brackets: bool
) -> None:
    facts = load_tokenizer(str(byte_tokenizer))
    engine = open_engine(facts)
    value = ",".join(items)
    value = f"[{value}]" if brackets else value
    kinds = [re.fullmatch("-?[0-9]+", item.strip()) is not None for item in ",".join(items).split(",")]
    if not (any(kinds) if brackets else all(kinds)):
        wanted = tuple(engine.encode([value], parse_special=True)[0].tolist()) if value else ()
        assert recipes.ids_of(value, "doc_prefix", engine, facts) == wanted
    elif all(kinds) and all(0 <= int(item) < facts.vocab_size and "-" not in item for item in items):
        assert recipes.ids_of(value, "doc_prefix", engine, facts) == tuple(map(int, items))
    else:
        with pytest.raises(UserError, match=r"--doc_prefix .*: .*ids are numbers from 0 to"):
            recipes.ids_of(value, "doc_prefix", engine, facts)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("[1,x]", '"x" is no id'),
        ("[1,]", '"" is no id'),
        ("-1", "id -1 is below 0"),
        ("[-1, 2]", "id -1 is below 0"),
        ("9" * 5000, "is beyond the vocabulary"),
    ],
)
def test_ids_that_are_none_are_one_line_and_leave_nothing(
    tmp_path: Path, byte_tokenizer: Path, value: str, said: str
) -> None:
    source = write_jsonl(tmp_path / "some.jsonl", ["a"])
    words = ["-i", source, "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain"]
    for option in ("--doc_prefix", "--doc_suffix", "--sequence_prefix"):
        more = ["--stack"] if option == "--sequence_prefix" else []
        refused = raw2ids(*words, *more, f"{option}={value}", check=False)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert said in refused.stderr
    assert not (tmp_path / "out").exists()


def test_documents_end_in_what_the_summary_and_the_manifest_name(tmp_path: Path, byte_tokenizer: Path) -> None:
    source = write_jsonl(tmp_path / "some.jsonl", ["one", "two"])
    words = ["-i", source, "--tokenizer", byte_tokenizer, "-t", "pretrain"]
    of_token = {token["content"]: token["id"] for token in load_tokenizer(str(byte_tokenizer)).added}
    end, turn = of_token["<|endoftext|>"], of_token["<|im_end|>"]
    for suffix, ids, named in (
        (None, [end], "<|endoftext|>"),
        ("<|im_end|>", [turn], "<|im_end|>"),
        (str(turn), [turn], "<|im_end|>"),
        ("a", None, "a"),
        ("", [], ""),
    ):
        out = tmp_path / f"out {suffix}"
        result = raw2ids(*words, "-o", out, *([] if suffix is None else ["--doc_suffix", suffix]))
        manifest = read_manifest(out)
        assert manifest is not None
        recorded = manifest.extra["document_end"]
        assert recorded["token"] == named
        assert ids is None or recorded["ids"] == ids
        assert all(row[len(row) - len(recorded["ids"]) :] == recorded["ids"] for row in rows_of(out))
        said = f"{named} ({', '.join(map(str, recorded['ids']))})" if named else "nothing"
        assert f"  documents end in {said}\n" in result.stdout


def test_formats_are_asked_for_or_found_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "x", "output": "y"}\n')
    (tmp_path / "b.json").write_text('[[{"user": "x"}, {"assistant": "y"}]]')
    (tmp_path / "c.jsonl").write_text("")
    sources = resolve([str(tmp_path)])
    assert recipes.formats_of(config(), sources) == ("alpaca", "roles", "messages")
    assert recipes.formats_of(config(format="sharegpt"), sources) == ("sharegpt",) * 3
    mapped = config(field_map="user=q, assistant=a")
    assert recipes.formats_of(mapped, sources) == ("fields",) * 3
    assert recipes.field_map(mapped) == {"user": "q", "assistant": "a"}
    with pytest.raises(UserError, match="write role=field"):
        recipes.field_map(config(field_map="who=q"))
    (tmp_path / "c.jsonl").write_text('{"odd": 1}\n')
    with pytest.raises(UserError, match=r"^-i c\.jsonl: its first records \(.*\) look like no known chat format"):
        recipes.formats_of(config(), resolve([str(tmp_path)]))


def test_what_a_file_without_a_known_format_is(tmp_path: Path) -> None:
    """What cannot be read is no format that is not known."""
    for data, said in (
        (b"question,answer\nq,a\n", r"none of its first records can be read \(a\.jsonl:1: bad JSON: "),
        (b'{"a": "caf\xe9"}\n', r"none of its first records can be read \(a\.jsonl:1: not UTF-8: byte 10: "),
        (b'{"data": [], "version": 1}\n', r"its first records \(the first has: data, version\) look like no known"),
        (b'"text"\n', r"its first records \(the first is text\) look like no known"),
    ):
        (tmp_path / "a.jsonl").write_bytes(data)
        config = Raw2IdsConfig(input=(str(tmp_path / "a.jsonl"),), tokenizer="none")
        with pytest.raises(UserError, match=said):
            recipes.formats_of(config, resolve(config.input))


def test_templates_have_names_files_or_are_text(tmp_path: Path, byte_tokenizer: Path) -> None:
    facts = load_tokenizer(str(byte_tokenizer))
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages }}é", encoding="utf-8")
    for given, wanted in (
        ("chatml", (TEMPLATES["chatml"], "chatml")),
        (str(path), ("{{ messages }}é", "own.jinja")),
        ("{{ text }}", ("{{ text }}", "given as text")),
    ):
        assert recipes.template_of(config(chat_template=given), facts) == wanted
    with pytest.raises(UserError, match='Did you mean "chatml"'):
        recipes.template_of(config(chat_template="chatmk"), facts)
    with pytest.raises(UserError, match="has no chat template; choose one with --chat_template"):
        recipes.template_of(config(), facts)


def test_named_templates_of_a_tokenizer(byte_tokenizer: Path) -> None:
    named = {"default": "{{ 1 }}", "tool_use": "{{ strftime_now('%d') }}", "rag": "{{ 3 }}"}
    facts = dataclasses.replace(
        load_tokenizer(str(byte_tokenizer)), chat_template=named["default"], chat_templates=named
    )
    assert recipes.template_of(config(), facts) == ("{{ 1 }}", "the tokenizer's own")
    assert recipes.tools_template_of(config(), facts) == named["tool_use"]
    assert recipes.date_of(config(date="2026-01-31"), recipes.template_text(config(), facts), None) == "2026-01-31"
    for name in named:
        assert recipes.template_of(config(chat_template=name), facts)[0] == named[name]
        assert recipes.tools_template_of(config(chat_template=name), facts) is None
    assert recipes.template_of(config(chat_template="chatml"), facts)[1] == "chatml"
    with pytest.raises(UserError, match=r'there are: default, tool_use, rag, chatml.*Did you mean "tool_use"'):
        recipes.template_of(config(chat_template="tool_us"), facts)
    without = dataclasses.replace(facts, chat_template=None, chat_templates={"tool_use": "x", "rag": "y"})
    with pytest.raises(
        UserError, match=r"has several chat templates \(rag, tool_use\), and none that is called default"
    ):
        recipes.template_of(config(), without)


def test_templates_that_cannot_be_read(tmp_path: Path, byte_tokenizer: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="no UTF-8 at byte 0"):
        recipes.template_of(config(chat_template=str(path)), load_tokenizer(str(byte_tokenizer)))


def test_dates_of_templates_that_show_one() -> None:
    shows = "{{ strftime_now('%d') }}"
    assert recipes.date_of(config(date="2026-01-31"), "no date", None) == ""
    assert recipes.date_of(config(date="2026-01-31"), shows, "2025-01-01") == "2026-01-31"
    assert recipes.date_of(config(), shows, "2025-01-01") == "2025-01-01"
    with pytest.raises(UserError, match="write it as 2026-01-31"):
        recipes.date_of(config(date="31.1.2026"), shows, None)
