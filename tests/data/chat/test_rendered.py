"""Processes that render conversations: they begin before the engine is there, and none outlives its command."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from jllm.data.chat import render_workers
from jllm.data.prepare import run as prepare
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.prepare.conversion import IN_FLIGHT_CHUNKS
from jllm.data.prepare.encoding import ChatEncoder
from jllm.data.sources import chunks
from tests.data.raw2ids_runs import documents, rows_of


@pytest.fixture
def chat(tmp_path: Path, byte_tokenizer: Path) -> dict[str, Any]:
    rows = [[{"user": text[:90]}, {"assistant": text[-90:]}] for text in documents(400)]
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"input": (str(source),), "tokenizer": str(byte_tokenizer), "chat_template": "chatml", "quiet": True}


def test_conversations_are_rendered_before_the_engine_is_there(
    tmp_path: Path, chat: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare.prepare(Raw2IdsConfig(**chat, output=tmp_path / "wanted", cores=1))
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 10)
    begun = threading.Semaphore(0)
    ahead: list[bool] = []
    begin, open_engine = ChatEncoder.begin, prepare.open_engine

    def counted(self: ChatEncoder, *arguments: Any) -> Any:
        begun.release()
        return begin(self, *arguments)

    def late(*arguments: Any, **named: Any) -> Any:
        ahead.append(all(begun.acquire(timeout=20) for _ in range(IN_FLIGHT_CHUNKS)))
        ahead.append(begun.acquire(timeout=0.2))  # and not without end
        return open_engine(*arguments, **named)

    monkeypatch.setattr(ChatEncoder, "begin", counted)
    monkeypatch.setattr(prepare, "open_engine", late)
    prepare.prepare(Raw2IdsConfig(**chat, output=tmp_path / "out", cores=2))
    assert ahead == [True, False]
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "wanted")


def test_a_finished_data_set_starts_nothing(
    tmp_path: Path, chat: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Raw2IdsConfig(**chat, output=tmp_path / "out", cores=2)
    made = prepare.prepare(config)

    def started(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("started")

    monkeypatch.setattr(prepare, "EarlyEngines", started)
    monkeypatch.setattr(render_workers, "ProcessPoolExecutor", started)
    assert prepare.prepare(config).files == made.files


# A process that is left behind holds the pipes of the command open: they would not come to their end in time.


@pytest.mark.parametrize(("words", "code"), [([], 0), (["--max_rows", "3"], 0), (["--chat_template", "chatmk"], 2)])
def test_no_process_is_left_behind(tmp_path: Path, chat: dict[str, Any], words: list[str], code: int) -> None:
    result = subprocess.run([*_command(tmp_path, chat), *words], capture_output=True, timeout=60)
    assert result.returncode == code, result.stderr


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_a_killed_command(tmp_path: Path, chat: dict[str, Any], how: signal.Signals) -> None:
    source = Path(chat["input"][0])
    source.write_bytes(source.read_bytes() * 200)
    process = subprocess.Popen(_command(tmp_path, chat), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert b"format" in process.stderr.readline()  # the workers have begun
    process.send_signal(how)
    process.communicate(timeout=30)
    assert process.returncode == -how


def _command(folder: Path, chat: dict[str, Any]) -> list[str]:
    words = ["-i", chat["input"][0], "-o", folder / "out", "--tokenizer", chat["tokenizer"], "--cores", 2, "--quiet"]
    command = [sys.executable, "-m", "jllm.raw2ids", *words, "--chat_template", chat["chat_template"]]
    return [str(word) for word in command]
