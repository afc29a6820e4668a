"""A chunk of records becomes text that is ready to be encoded, and what is bad in it is said with its line."""

import json
from pathlib import Path

from jllm.data.chat.rendered import render_chunk, renderer_of
from jllm.data.sources.chunk import Chunk
from tests.data.chats import PLAIN, assistant, chat_of, user


def test_a_chunk_of_records(tmp_path: Path) -> None:
    plan = chat_of(tmp_path, PLAIN).plan
    records = [{"messages": [user(f"q{n}"), assistant(f"a{n}")]} for n in range(3)]
    lines = [json.dumps(records[0]), "", "{", json.dumps({"messages": [user("alone")]}), *map(json.dumps, records[1:])]
    data = "\n".join(lines).encode()
    chunk = Chunk(source=0, index=0, line=11, data=data, end=len(data), end_line=17)
    found = render_chunk(chunk, "jsonl", "messages", {}, plan)
    assert found.lines == [11, 15, 16]
    assert [(each.line, each.kind) for each in found.bad] == [(13, "bad JSON"), (14, "no answer")]
    assert found.records == 5
    assert len(found.offsets) == 4
    assert (found.sequence < 0).sum() == len(found.texts)
    assert found.sample is not None
    assert found.sample[0] == 0
    assert "q0" in found.sample[1]
    answers = {found.texts[text][start:end] for text, start, end in found.spans.tolist()}
    assert {f"a{n}" for n in range(3)} <= answers
    assert renderer_of(plan) is renderer_of(plan), "compiling a template takes longer than a chunk"
