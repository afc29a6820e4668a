"""The output folder of a run: one run at a time."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from jllm.data.dataset.manifest import read_manifest, write_manifest
from jllm.data.prepare import outputs
from jllm.data.prepare.saving.sink import ResumePoint, Sink
from jllm.data.prepare.workplace import Workplace
from jllm.data.sources import identity
from jllm.data.sources.chunks import CHUNK_BYTES
from jllm.errors import UserError
from tests.data.chats import PLAIN
from tests.data.raw2ids_runs import documents, finished_files, raw2ids, tree, write_jsonl


def test_a_second_run_waits_its_turn(tmp_path: Path, byte_tokenizer: Path) -> None:
    from jllm.data.prepare.workplace import Workplace
    from jllm.errors import UserError

    second = Workplace(tmp_path / "out").locked()
    with Workplace(tmp_path / "out").locked(), pytest.raises(UserError, match="another run"):
        second.__enter__()


IDENTITY: dict[str, Any] = {
    "options": {"max_len": 5, "stack": True},
    "tokenizer": "abc",
    "rules": 1,
    "template": ["a", None],
    "sources": [{"name": "a.jsonl", "bytes": 3, "stem": "a", "sample": None, "modified": None}],
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": {"max_len": 6, "stack": True}}, "was made with max_len = 5, now it is 6"),
        ({"options": {"max_len": 5}}, "was made with stack = True, now it is None"),
        ({"tokenizer": "other"}, "another tokenizer"),
        ({"rules": 0}, "another version of this command, whose rules are not the same"),
        ({"template": ["b", None]}, "the chat template was changed since it was begun"),
        ({"sources": []}, r"the input changed \(a\.jsonl\)"),
        ({"sources": [{**IDENTITY["sources"][0], "bytes": 4}]}, r"the input changed \(a\.jsonl\)"),
    ],
)
def test_an_unfinished_run_is_gone_on_with_only_as_it_was(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    place = Workplace(tmp_path / "out")
    with place.locked():
        assert place.finished(IDENTITY) is None
        assert place.finished(IDENTITY) is None
        with pytest.raises(UserError, match=f"{said}; start over with -C"):
            place.finished({**IDENTITY, **change})
        place.remember({**IDENTITY, **change})
        assert place.finished({**IDENTITY, **change}) is None


def test_notes_stay_until_the_folder_is_cleaned(tmp_path: Path) -> None:
    place = Workplace(tmp_path / "out")
    with place.locked():
        assert place.noted("hf engine") is None
        place.note("hf engine", "because é")
        assert Workplace(tmp_path / "out").noted("hf engine") == "because é"
        (place.work / ".block-00000-0000000.7.tmp").touch()
        place.discard_temporaries()
        assert sorted(path.name for path in place.work.iterdir()) == ["lock", "note hf engine"]
        place.clean()
        assert [path.name for path in place.work.iterdir()] == ["lock"]
        place.close()
    assert not place.work.exists()


def test_a_run_that_fails_before_it_made_anything_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Workplace(tmp_path / "deep" / "out").locked():
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"), Workplace(tmp_path / "file" / "out").locked():
        pass


def test_a_data_set_is_finished_only_by_the_same_template_and_rules(
    tmp_path: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(PLAIN)
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(chat))
    words: list[object] = ["-i", tmp_path / "a.jsonl", "-o", tmp_path / "out", "--tokenizer", byte_tokenizer]
    words += ["--chat_template", template]
    raw2ids(*words)
    assert "finished earlier" in raw2ids(*words).stdout
    before = tree(tmp_path / "out")
    template.write_text(PLAIN.replace("im_start", "im_begin"))
    refused = raw2ids(*words, check=False)
    assert refused.returncode == 2
    assert "the chat template was changed" in refused.stderr
    assert "-C" in refused.stderr
    template.write_text(PLAIN)
    monkeypatch.setattr("jllm.data.prepare.run.RULES", outputs.RULES + 1)
    refused = raw2ids(*words, check=False)
    assert refused.returncode == 2
    assert "rules" in refused.stderr
    monkeypatch.undo()
    assert tree(tmp_path / "out") == before
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    del manifest.extra["rules"]  # as an older version left it
    write_manifest(tmp_path / "out", manifest)
    assert raw2ids(*words, check=False).returncode == 2


@pytest.mark.parametrize("large", [False, True])
def test_a_file_in_the_place_of_another_is_noticed(
    tmp_path: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """Whatever its date; a copy of the same is the same, as far as that can be told."""
    if large:
        monkeypatch.setattr(identity, "WHOLE", 10)
        monkeypatch.setattr(identity, "_STRETCH", 1)
    source = write_jsonl(tmp_path / "a.jsonl", documents(30))
    words = ["-i", source, "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain", "--stack"]
    raw2ids(*words)
    assert "finished earlier" in raw2ids(*words).stdout
    os.utime(source, ns=(5, 5))  # which changes what is known of a large one
    assert ("finished earlier" in raw2ids(*words, check=False).stdout) == (not large)
    raw2ids(*words, "-C")
    other = tmp_path / "other"
    other.write_bytes(source.read_bytes()[:-40] + source.read_bytes()[-40:].replace(b"a", b"b"))
    assert other.stat().st_size == source.stat().st_size
    os.utime(other, ns=(5, 5))
    other.replace(source)
    refused = raw2ids(*words, check=False)
    assert refused.returncode == 2
    assert "the input changed (a.jsonl); start over with -C" in refused.stderr


@pytest.mark.parametrize("good", [0, 1, 3])
@pytest.mark.parametrize("more", [[], ["--eval_fraction", 0.3]], ids=["one set", "two sets"])
def test_a_damaged_file_may_be_mended(tmp_path: Path, byte_tokenizer: Path, good: int, more: list[object]) -> None:
    """The same line then goes on: with what was made of the files before it, as if nothing had been damaged."""
    files = {f"{number}.jsonl.gz": documents(1000, seed=number) for number in range(good + 2)}
    (tmp_path / "in").mkdir()
    for name, texts in files.items():
        data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        (tmp_path / "in" / name).write_bytes(gzip.compress(data, mtime=0))
    words: list[object] = ["--tokenizer", byte_tokenizer, "-t", "pretrain", "--batch_size", 100, *more]
    raw2ids("-i", tmp_path / "in", "-o", tmp_path / "wanted", *words)
    damaged = tmp_path / "in" / f"{good}.jsonl.gz"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-20])
    line = ["-i", tmp_path / "in", "-o", tmp_path / "out", *words]
    for _ in range(2):
        failed = raw2ids(*line, check=False)
        assert failed.returncode == 2
        assert damaged.name in failed.stderr
        assert (tmp_path / "out").exists() == bool(good), "a run that made nothing leaves nothing"
    kept = finished_files(tmp_path / "out")
    assert bool(kept) == bool(good)
    damaged.write_bytes(whole)
    raw2ids(*line)
    assert tree(tmp_path / "out") == tree(tmp_path / "wanted")
    if more:
        assert tree(tmp_path / "_eval" / "out") == tree(tmp_path / "_eval" / "wanted")
    assert kept.items() <= finished_files(tmp_path / "out").items(), "what was made before stays"


def test_a_damaged_file_that_a_killed_run_had_begun(
    tmp_path: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was made of its good part cannot be told apart any more: mended, all is made anew, by the same line."""
    texts = [text * 20 for text in documents(3000)]
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", documents(30))
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    assert len(data) > 3 * CHUNK_BYTES
    damaged = tmp_path / "in" / "b.jsonl.gz"
    damaged.write_bytes(gzip.compress(data, mtime=0))
    words: list[object] = ["--tokenizer", byte_tokenizer, "-t", "pretrain", "--batch_size", 100]
    raw2ids("-i", tmp_path / "in", "-o", tmp_path / "wanted", *words)
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) * 3 // 4])
    line = ["-i", tmp_path / "in", "-o", tmp_path / "out", *words]
    feed = Sink.feed

    def killed(self: Sink, point: ResumePoint, *fed: Any) -> None:
        feed(self, point, *fed)
        if point.place == (1, 1):
            raise RuntimeError("killed")

    monkeypatch.setattr(Sink, "feed", killed)
    with pytest.raises(RuntimeError):
        raw2ids(*line)
    monkeypatch.undo()
    assert len(finished_files(tmp_path / "out")) > 1
    failed = raw2ids(*line, check=False)
    assert "b.jsonl.gz: cannot be read" in failed.stderr
    assert "run the same command again when it is mended" in failed.stderr
    damaged.write_bytes(whole)
    raw2ids(*line)
    assert tree(tmp_path / "out") == tree(tmp_path / "wanted")


def test_another_file_may_not_be_changed_with_the_damaged_one(tmp_path: Path, byte_tokenizer: Path) -> None:
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", documents(30))
    (tmp_path / "in" / "b.json").write_text('[{"text": "open"},')
    line = ["-i", tmp_path / "in", "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain"]
    assert raw2ids(*line, check=False).returncode == 2
    write_jsonl(tmp_path / "in" / "a.jsonl", documents(31))
    (tmp_path / "in" / "b.json").write_text('[{"text": "closed"}]')
    refused = raw2ids(*line, check=False)
    assert "the input changed (a.jsonl); start over with -C" in refused.stderr
    raw2ids(*line, "-C")
