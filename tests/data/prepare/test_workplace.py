"""The output folder of a run: one run at a time."""

from pathlib import Path
from typing import Any

import pytest

from jllm.data.prepare.workplace import Workplace, modified_at
from jllm.errors import UserError


def test_a_second_run_waits_its_turn(tmp_path: Path, byte_tokenizer: Path) -> None:
    from jllm.data.prepare.workplace import Workplace
    from jllm.errors import UserError

    second = Workplace(tmp_path / "out").locked()
    with Workplace(tmp_path / "out").locked(), pytest.raises(UserError, match="another run"):
        second.__enter__()


IDENTITY: dict[str, Any] = {
    "options": {"max_len": 5, "stack": True},
    "tokenizer": "abc",
    "sources": [{"name": "a.jsonl", "bytes": 3, "stem": "a", "modified": None}],
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": {"max_len": 6, "stack": True}}, "was made with max_len = 5, now it is 6"),
        ({"options": {"max_len": 5}}, "was made with stack = True, now it is None"),
        ({"tokenizer": "other"}, "another tokenizer"),
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
    assert modified_at(str(tmp_path / "file")) == (tmp_path / "file").stat().st_mtime_ns
    assert modified_at("s3://bucket/a") is None
