"""Some 300 bad or odd inputs for the data commands, made on the spot: contents, file systems, data sets, options.

A `Case` makes a folder and says which command is run on it. What every case must do is in tests/test_bad_inputs.py.
"""

import dataclasses
import functools
import gzip
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from tests.data.sets import make_set
from tests.odd_files import (
    COMPRESSIONS,
    DAMAGED_JSON,
    Make,
    folder_at,
    link,
    mode,
    of_name,
    socket_among,
    write,
    written,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A bad or odd input.

    Attributes:
        name: for people.
        command: out of `COMMANDS` of the test.
        make: makes it in a folder in which good input lies already: texts, chats and sets as `good` makes them.
        words: the command line; {folder} is the folder.
        bare: without what lets root read and write all.
        keeps: what was made of the files before a damaged one may stay in the work folder.
    """

    name: str
    command: str
    make: Make
    words: tuple[str, ...]
    bare: bool = False
    keeps: bool = False


def good(folder: Path) -> None:
    """Input that every command takes: texts in `in`, chats in `chats`, two data sets in `sets`."""
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "a.jsonl").write_text("".join(json.dumps({"text": f"good text {i}"}) + "\n" for i in range(5)))
    (folder / "chats").mkdir()
    record = {"messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]}
    (folder / "chats" / "a.jsonl").write_text((json.dumps(record) + "\n") * 5)
    for name in ("one", "two"):
        make_set(folder / "sets" / name, 12, 2)


TEXTS = ("-i", "{folder}/in", "-o", "{folder}/out", "-t", "pretrain")
CHATS = ("-i", "{folder}/chats", "-o", "{folder}/out", "--chat_template", "chatml")
SHUFFLE = ("-d", "{folder}/sets", "-o", "{folder}/out")
ONE = ("{folder}/sets/one",)
GOOD_WORDS = {
    "raw2ids": TEXTS,
    "shuffle_datasets": SHUFFLE,
    "shuffle_partition": SHUFFLE,
    "repartition": ("-d", "{folder}/sets", "-n", "1"),
    "manifest": (*ONE, "--force"),
    "inspect": (*ONE, "--verify"),
}


CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "white space": b" \n\r\n\t \n",
    "a byte order mark alone": b"\xef\xbb\xbf",
    "a byte order mark": b'\xef\xbb\xbf{"text": "a"}\n',
    "UTF-16": '{"text": "some text"}\n'.encode("utf-16"),
    "UTF-16 without a mark": '{"text": "some text"}\n'.encode("utf-16-be"),
    "UTF-32": '{"text": "some text"}\n'.encode("utf-32"),
    "Latin-1": '{"text": "déjà vu"}\n'.encode("latin-1"),
    "NUL": b'{"text": "a\0b"}\n\0\0\0\n',
    "control codes": b'{"\x1b]0;title\x07": "\x1b[31mred\x9b5m"}\n',
    "escaped control codes": b'{"\\u001b[31m": 1, "text": 3}\n{"text": "\\u001b[2J\\u0007\\u009b5m\\u202e"}\n',
    "half a surrogate pair": b'{"text": "\\ud800"}\n',
    "null": b'{"text": null}\nnull\n',
    "wrong types": b'{"text": 1}\n{"text": [1]}\n{"text": {}}\n{"text": true}\n1\n"text"\n[]\n[{}]\ntrue\n',
    "large numbers": b'{"text": "a", "n": 1e999, "m": 99999999999999999999999999}\n{"text": NaN}\n',
    "deep nesting": b'{"text": ' + b"[" * 50_000 + b"]" * 50_000 + b"}\n",
    "deep nesting that does not close": b'{"text": ' + b'[{"a":' * 50_000,
    "a line that is cut off": b'{"text": "good"}\n{"text": "bad',
    "text that is no JSON": b"once upon a time\n\nthere was\n",
    "carriage returns alone": b'{"text": "a"}\r{"text": "b"}\r',
    "carriage returns": b'{"text": "a"}\r\n{"text": "b"}\r\n',
    "a list": b'[{"text": "a"}, {"text": "b"}]',
    "a list that does not close": b'[{"text": "a"}, {"text": "b"},',
    "a list cut off in an element": b'[{"text": "a"}, {"text": "b',
    "a list and more": b'[{"text": "a"}] and more',
    "several lists": b'[{"text": "a"}]\n[\n{"text": "b"}\n]\n',
    "an object over lines": b'{\n "text": "a"\n}\n',
    "an object that does not close": b'{\n "text": "a",\n',
    "too many brackets": b'{"text": "a"}]}\n}\n',
    "a key twice": b'{"text": "a", "text": "b"}\n',
    "binary": bytes(range(256)) * 20,
    "many bad records": b'{"text": null}\n' * 30 + b'{"text": "good"}\n',
    "gzip by its bytes": gzip.compress(b'{"text": "a"}\n'),
    "zstd by its bytes": zstandard.ZstdCompressor().compress(b'{"text": "a"}\n'),
    "Parquet by its bytes": b"PAR1" + b"\0" * 40 + b"PAR1",
    "a bad chat": b'{"messages": [{"role": "\x1b[31m", "content": 0}]}\n{"messages": []}\n{"messages": 1}\n',
    "chats with odd parts": b'{"messages": [[], null, {"role": 1}]}\n{"messages": [{"content": [{"type": "x"}]}]}\n',
}
_KEEPS = ("many bad records", "a list that does not close", "a list cut off in an element", "binary")


def _contents() -> Iterator[Case]:
    for (what, data), suffix in itertools.product(CONTENTS.items(), (".jsonl", ".json", ".txt")):
        make = write(f"in/bad{suffix}", data)
        yield Case(name=f"{what} in {suffix}", command="raw2ids", make=make, words=TEXTS, keeps=what in _KEEPS)
    for what, data in CONTENTS.items():
        words = ("-i", "{folder}/alone.jsonl", *TEXTS[2:])
        make = write("alone.jsonl", data)
        yield Case(name=f"{what}, alone", command="raw2ids", make=make, words=words, keeps=what in _KEEPS)
        yield Case(name=f"{what} as chats", command="raw2ids", make=write("chats/bad.jsonl", data), words=CHATS)
    plain = b"".join(b'{"text": "some text %d"}\n' % i for i in range(2000))
    for suffix, compress in COMPRESSIONS.items():
        whole = compress(plain)
        for what, data in (
            ("empty", b""),
            ("cut short", whole[: len(whole) // 2]),
            ("cut short by a byte", whole[:-1]),
            ("damaged", whole[: len(whole) // 2] + b"\xff\0\xff" + whole[len(whole) // 2 + 3 :]),
            ("not compressed", plain[:200]),
            ("twice compressed", compress(whole)),
            ("garbage behind", whole + b"garbage"),
        ):
            make = write(f"in/b.jsonl{suffix}", data)
            yield Case(name=f"{suffix} {what}", command="raw2ids", make=make, words=TEXTS, keeps=True)
            alone = ("-i", "{folder}/in/b.jsonl" + suffix, *TEXTS[2:])
            yield Case(name=f"{suffix} {what}, alone", command="raw2ids", make=make, words=alone)


def _table(**columns: Any) -> Make:
    return lambda folder: pq.write_table(pa.table(columns), folder / "in" / "b.parquet")


def _parquet() -> Iterator[Case]:
    def cut(folder: Path) -> None:
        pq.write_table(pa.table({"text": ["a", "b"]}), folder / "in" / "b.parquet")
        data = (folder / "in" / "b.parquet").read_bytes()
        (folder / "in" / "b.parquet").write_bytes(data[: len(data) * 2 // 3])

    def damaged(folder: Path) -> None:
        pq.write_table(pa.table({"text": ["some text"] * 99}), folder / "in" / "b.parquet", compression="zstd")
        data = bytearray((folder / "in" / "b.parquet").read_bytes())
        data[8:40] = b"\xff" * 32
        (folder / "in" / "b.parquet").write_bytes(data)

    made: dict[str, Make] = {
        "cut short": cut,
        "damaged": damaged,
        "empty": write("in/b.parquet", b""),
        "no rows": _table(text=pa.array([], pa.string())),
        "no columns": lambda folder: pq.write_table(pa.table({}), folder / "in" / "b.parquet"),
        "nulls": _table(text=pa.array([None, "a"])),
        "numbers": _table(text=[1, 2]),
        "lists": _table(text=[["a"], ["b"]]),
        "a dictionary": _table(text=pa.array(["a", "b"]).dictionary_encode()),
        "binary": _table(text=pa.array([b"\xff\xfe", b"a"])),
        "another column": _table(**{"\x1b[31mcontent": ["a"]}),
        "ids below 0": _table(input_ids=[[-1, 2]]),
        "ids beyond": _table(input_ids=[[1 << 40, 2]]),
        "null ids": _table(input_ids=[[None, 2], None]),
        "ids of text": _table(input_ids=["a"]),
        "wrong labels": _table(input_ids=[[1, 2, 3]], labels=[[1]]),
        "dates": _table(text=pa.array([1, 2], pa.timestamp("ns"))),
    }
    for what, make in made.items():
        yield Case(name=f"Parquet: {what}", command="raw2ids", make=make, words=TEXTS, keeps=True)
        alone = ("-i", "{folder}/in/b.parquet", *TEXTS[2:])
        yield Case(name=f"Parquet: {what}, alone", command="raw2ids", make=make, words=alone)


def _file_systems() -> Iterator[Case]:
    inputs: dict[str, Make] = {
        "a link that leads nowhere": link("in/b.jsonl", "nowhere"),
        "a link to itself": link("in/b.jsonl", "b.jsonl"),
        "a link to the folder": link("in/back", "../in"),
        "a link to a file twice": link("in/b.jsonl", "a.jsonl"),
        "a link to a folder of files": link("in/more", "../sets"),
        "a folder like a file": folder_at("in/b.jsonl"),
        "a pipe": lambda folder: os.mkfifo(folder / "in" / "b.jsonl"),
        "a socket": socket_among,
        "a link as the input": link("in", "nowhere"),
        "a loop as the input": link("in", "in"),
        "a data set inside": lambda folder: make_set(folder / "in" / "set", 3),
        "an unfinished data set inside": folder_at("in/set/.raw2ids"),
    }
    for what, make in inputs.items():
        yield Case(name=what, command="raw2ids", make=make, words=TEXTS)
    for name in (
        b"_b.jsonl", b".b.jsonl", b"\xff\xfe.jsonl", b"a\nb.jsonl", b"\x1b[31m.jsonl", b"x" * 245 + b".jsonl",
        b"%41=b.jsonl", b"b.JSONL.GZ", b"'\"$.jsonl", "é日.jsonl".encode(), b"b", b"b.jsonl.tmp", b".jsonl",
        b"?*.jsonl", b"a b.jsonl",
    ):  # fmt: skip
        is_damaged = name.lower().endswith(b".gz")
        called = f"the name {name[:20]!r}"
        yield Case(name=called, command="raw2ids", make=of_name(name), words=TEXTS, keeps=is_damaged)
        alone = ("-i", "{folder}/in/" + os.fsdecode(name), *TEXTS[2:])
        yield Case(name=f"the name {name[:20]!r} alone", command="raw2ids", make=of_name(name), words=alone)
    for what, make in {
        "a file that may not be read": mode("in/b.jsonl", 0, is_folder=False),
        "a folder that may not be read": mode("in/deep", 0, is_folder=True),
        "an input that may not be read": mode("in", 0, is_folder=True),
        "an input that may not be entered": mode("in", 0o400, is_folder=True),
        "an output that may not be written": mode("out", 0o500, is_folder=True),
        "an output that may not be entered": mode("out", 0, is_folder=True),
        "a parent that may not be written": mode(".", 0o500, is_folder=True),
        "a tokenizer's cache elsewhere": mode("out", 0o700, is_folder=True),
    }.items():
        yield Case(name=what, command="raw2ids", make=make, words=TEXTS, bare=True)
    for command, words in (("raw2ids", TEXTS), ("shuffle_datasets", SHUFFLE), ("shuffle_partition", SHUFFLE)):
        for what, make in {
            "a file": write("out", b"file"),
            "a link that leads nowhere": link("out", "nowhere/deep"),
            "a loop": link("out", "out"),
            "below a file": lambda folder: (folder / "out").symlink_to(folder / "in" / "a.jsonl" / "deep"),
        }.items():
            yield Case(name=f"{command}: the output is {what}", command=command, make=make, words=words)
    for place, (what, data) in itertools.product((".raw2ids/run.json", "_manifest.json"), DAMAGED_JSON.items()):
        yield Case(name=f"{place} is {what}", command="raw2ids", make=write(f"out/{place}", data), words=TEXTS)
    for place in (".raw2ids/run.json", ".raw2ids/lock", "_manifest.json", ".raw2ids/bad records"):
        yield Case(name=f"{place} is a folder", command="raw2ids", make=folder_at(f"out/{place}"), words=TEXTS)
    yield Case(name="the work folder is a file", command="raw2ids", make=write("out/.raw2ids", b""), words=TEXTS)
    for where in ("in", "in/out", "in/deep/out"):
        words = (*TEXTS[:2], "-o", "{folder}/" + where, *TEXTS[4:], "-C")
        yield Case(name=f"an output in {where}", command="raw2ids", make=lambda folder: None, words=words)


def _spoiled(keys: tuple[object, ...], value: object) -> Make:
    """The manifest of a set with another value at a place in it."""

    def make(folder: Path) -> None:
        path = folder / "sets" / "one" / "_manifest.json"
        whole = json.loads(path.read_text())
        inner = whole
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        path.write_text(json.dumps(whole))

    return make


def _sets() -> Iterator[Case]:
    shard = "sets/one/one-00000/one-00000-00000.zstd.parquet"
    made: dict[str, Make] = {
        f"the manifest is {what}": write("sets/one/_manifest.json", data) for what, data in DAMAGED_JSON.items()
    }
    made |= {
        f"{'.'.join(map(str, keys))} is {value!r}": _spoiled(keys, value)
        for keys, value in (
            (("format",), "1"), (("made_by",), []), (("made_by", "options"), 3), (("files",), {}), (("files", 0), 3),
            (("files", 0, "rows"), "x"), (("files", 0, "rows"), -1), (("files", 0, "path"), "../../etc"),
            (("files", 0, "sha256"), 1), (("tokenizer",), 3), (("tokenizer", "vocab_size"), None), (("columns",), []),
            (("sources",), [1]), (("fingerprint",), None), (("files", 0, "bytes"), 1 << 70),
        )
    }  # fmt: skip
    made |= {
        "the manifest is a folder": folder_at("sets/one/_manifest.json"),
        "the manifest is a link to nothing": link("sets/one/_manifest.json", "nowhere"),
        "a shard is missing": lambda folder: (folder / shard).unlink(),
        "a shard is empty": write(shard, b""),
        "a shard is garbage": write(shard, b"PAR1" + b"x" * 99 + b"PAR1"),
        "a shard is a folder": folder_at(shard),
        "a shard is a loop": link(shard, Path(shard).name),
        "a shard more": write("sets/one/one-00000/more.parquet", b"x"),
        "no set": lambda folder: shutil.rmtree(folder / "sets"),
        "a file in its place": lambda folder: (shutil.rmtree(folder / "sets"), written(folder / "sets", b"x")),
        "a loop in its place": link("sets", "sets"),
        "an odd name": lambda folder: make_set(folder / "sets" / "\x1b[31m", 3),
    }
    for (what, make), (command, words) in itertools.product(made.items(), GOOD_WORDS.items()):
        if command != "raw2ids":
            yield Case(name=f"{command}: {what}", command=command, make=make, words=words)
    for command, words in GOOD_WORDS.items():
        if command == "raw2ids":
            continue
        for what, make in {
            "a shard may not be read": mode(shard, 0, is_folder=False),
            "a folder may not be read": mode("sets/one/one-00000", 0, is_folder=True),
            "the folder may not be written": mode("sets/one", 0o500, is_folder=True),
            "the parent may not be written": mode(".", 0o500, is_folder=True),
        }.items():
            yield Case(name=f"{command}: {what}", command=command, make=make, words=words, bare=True)
    for what, data in DAMAGED_JSON.items():
        for command in ("shuffle_datasets", "shuffle_partition"):
            make = write("out/one-00000/.plan.json", data)
            yield Case(name=f"{command}: the plan is {what}", command=command, make=make, words=SHUFFLE)


ODD_NUMBERS = ("0", "-1", "1", str(2**31), str(2**63), str(10**30), "1e3", "nan", "x", "", "٣")


def _options() -> Iterator[Case]:
    numbers = ("max_len", "batch_size", "num", "stride", "seed", "cores", "max_rows", "max_tokens", "eval_fraction")
    for option, value in itertools.product(numbers, ODD_NUMBERS):
        words = (*TEXTS, f"--{option}", value)
        yield Case(name=f"--{option} {value}", command="raw2ids", make=lambda folder: None, words=words)
    for more in (
        ("--doc_prefix", "[1,x]"), ("--doc_prefix", "-1"), ("--doc_suffix", "999999"), ("--sequence_prefix", "[1, 2"),
        ("--text_field", ""), ("--text_field", "a..b"), ("--tokenizer", "{folder}/in"), ("--tokenizer", "./nowhere"),
        ("--tokenizer", ""), ("--input_format", "parquet"), ("--input_format", "ids"), ("-i", "{folder}/*x*"),
        ("-i", "{folder}/in/../in"), ("-i", "s3x://bucket/a"), ("-i", "{folder}/in\x1b[31m"), ("--maxlen", "5"),
        ("--bad_records", "{folder}/in/a.jsonl"), ("--bad_records", "{folder}/in/bad"), ("--bad_records", "{folder}"),
        ("--bad_records", "{folder}/in/a.jsonl/bad"), ("--bad_records", "/dev/null/x"), ("--format", "messages"),
        ("--date", "2026-01-01"), ("--eval_output", "{folder}/x"), ("--eval_fraction", "0.999999"), ("-i", ""),
        ("--eval_fraction", "0.5", "--eval_output", "{folder}/out/x"), ("--dry_run",), ("--dry_run", "--stack"),
        ("--bad_records", "{folder}/deep/bad"),
    ):  # fmt: skip
        yield Case(name=" ".join(more), command="raw2ids", make=lambda folder: None, words=(*TEXTS, *more))
    for more in (
        ("--field_map", "user"), ("--field_map", "x=y"), ("--field_map", "user=a,assistant=b"), ("--format", "x"),
        ("--format", "alpaca"), ("--date", "yesterday"), ("--chat_template", "{{ nothing"), ("--dry_run",),
        ("--chat_template", "{folder}"), ("--chat_template", "{folder}/in/a.jsonl"),
        ("--format", "roles", "--field_map", "user=a,assistant=b"),
    ):  # fmt: skip
        yield Case(name=" ".join(more), command="raw2ids", make=lambda folder: None, words=(*CHATS, *more))
    for command, words in GOOD_WORDS.items():
        more_words: dict[str, tuple[str, ...]] = {
            "raw2ids": (),
            "shuffle_datasets": ("num_block", "seed", "cores", "mem_rate", "memory", "mix_total", "max_tokens"),
            "shuffle_partition": ("num_block",),
            "repartition": ("num_partition", "partition_tokens"),
            "manifest": ("cores",),
            "inspect": ("rows", "start"),
        }
        for option, value in itertools.product(more_words[command], ODD_NUMBERS):
            given = words[:2] if option == "partition_tokens" else words
            name = f"{command} --{option} {value}"
            yield Case(name=name, command=command, make=lambda folder: None, words=(*given, f"--{option}", value))
    for mix in (
        "one=1e400",
        "one=99999999999999999999",
        "one=-1",
        "one=nan",
        "one=x",
        "\x1b[31m=1",
        "one=1e18",
        "{folder}",
    ):
        words = (*SHUFFLE, "--mix", mix)
        yield Case(name=f"--mix {mix!r}", command="shuffle_datasets", make=lambda folder: None, words=words)
    for where in ("sets", "sets/one", "sets/out", "in/a.jsonl/x"):
        words = (*SHUFFLE[:2], "-o", "{folder}/" + where)
        yield Case(name=f"an output in {where}", command="shuffle_datasets", make=lambda folder: None, words=words)


@functools.cache
def all_cases() -> list[Case]:
    """All cases, in an order that takes some of every kind at any size."""
    kinds = [list(kind()) for kind in (_contents, _parquet, _file_systems, _sets, _options)]
    placed = [
        ((index + 0.5) / len(kind), number, case)
        for number, kind in enumerate(kinds)
        for index, case in enumerate(kind)
    ]
    strides = sorted(placed, key=lambda item: (item[0] * 997 % 1, item[1]))
    return [case for _, _, case in strides]
