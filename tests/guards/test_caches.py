"""What is kept for later commands is believed where it is whole and this user's, and missed where it is not."""

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jllm.guards import caches


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(caches, "_told", set())
    place = caches.place("things")
    assert place == tmp_path / "jllm" / "things"
    return place


@pytest.mark.parametrize("given", ["", "here", "./here", "../here", None])
def test_what_is_no_absolute_path_counts_as_unset(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert caches.place("things") == Path("/home/somebody/.cache/jllm/things")
    monkeypatch.setenv("HOME", "")
    found = caches.place("things")
    assert found is None or found.is_absolute()


def test_what_was_kept_is_read_and_is_nobody_elses(folder: Path) -> None:
    entry = folder / "a.jsonl"
    assert caches.read(entry) is None
    caches.write(entry, b"[1]\n[2]")
    assert caches.read(entry) == b"[1]\n[2]"
    assert [path.stat().st_mode & 0o777 for path in (folder.parent, folder, entry)] == [0o700, 0o700, 0o600]
    assert [path.name for path in folder.iterdir()] == ["a.jsonl"]


@given(st.data())
def test_a_changed_entry_is_none(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    entry = tmp_path_factory.getbasetemp() / "changed" / "jllm" / "things" / "a.jsonl"
    caches.write(entry, b'{"eos_id": 5}')
    whole = entry.read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(at, min(len(whole), at + 4)))
    changed = whole[:at] + data.draw(st.binary(max_size=4)) + whole[end:]
    entry.write_bytes(changed)
    assert caches.read(entry) == (b'{"eos_id": 5}' if changed == whole else None)
    entry.write_bytes(whole)
    elsewhere = entry.with_name("b.jsonl")
    elsewhere.write_bytes(whole)
    elsewhere.chmod(0o600)
    assert caches.read(elsewhere) is None


@pytest.mark.parametrize("which", ["jllm", "jllm/things", "jllm/things/a.jsonl"])
@pytest.mark.parametrize("how", ["written by others", "another user's"])
def test_what_others_may_have_written_is_not_believed(
    folder: Path, which: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if how == "another user's" and os.geteuid() != 0:
        pytest.skip("only root gives files away")
    entry = folder / "a.jsonl"
    caches.write(entry, b"{}")
    changed = folder.parent.parent / which
    if how == "another user's":
        os.chown(changed, 12345, 12345)
    else:
        changed.chmod(0o777)
    assert caches.read(entry) is None
    assert caches.read(entry) is None
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: the cache {changed} is not used: ")
    caches.write(entry, b"[]")
    assert caches.read(entry) == (b"[]" if changed == entry else None)
    assert not (folder.parent / "other").exists()
    assert caches.private_folder("other") != folder.parent / "other" or changed in (entry, folder)


@pytest.mark.parametrize("which", ["jllm", "jllm/things", "jllm/things/a.jsonl"])
def test_odd_things_in_the_place_of_a_cache_are_no_error(folder: Path, which: str) -> None:
    entry = folder / "a.jsonl"
    odd = folder.parent.parent / which
    odd.parent.mkdir(parents=True, exist_ok=True)
    for make in (odd.touch, lambda: odd.symlink_to(odd), lambda: os.mkfifo(odd)):
        make()
        assert caches.read(entry) is None
        caches.write(entry, b"{}")
        odd.unlink()
    if odd == entry:
        odd.mkdir()
        caches.write(entry, b"{}")
        assert caches.read(entry) is None


def test_an_entry_is_not_read_through_a_link(folder: Path, tmp_path: Path) -> None:
    caches.write(folder / "a.jsonl", b"{}")
    (folder / "a.jsonl").rename(tmp_path / "a.jsonl")
    (folder / "a.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert caches.read(folder / "a.jsonl") is None


def test_the_oldest_entries_go_and_what_killed_commands_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "MOST_ENTRIES", 3)
    caches.make(folder)
    for name, seconds in ((".x.tmp", 1.0), (".y.tmp", None)):
        (folder / name).touch()
        if seconds is not None:
            os.utime(folder / name, (seconds, seconds))
    for number in range(5):
        caches.write(folder / f"{number}.jsonl", b"{}")
        os.utime(folder / f"{number}.jsonl", (number + 10, number + 10))
    assert sorted(path.name for path in folder.iterdir()) == [".y.tmp", "2.jsonl", "3.jsonl", "4.jsonl"]


def test_two_writers_leave_one_whole_entry(folder: Path) -> None:
    contents = [bytes([65 + number]) * 100_000 for number in range(4)]
    entry, seen, stop = folder / "a.jsonl", set(), threading.Event()
    caches.write(entry, contents[0])

    def read() -> None:
        while not stop.is_set():
            seen.add(caches.read(entry))

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=lambda c=c: [caches.write(entry, c) for _ in range(20)]) for c in contents]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert seen <= set(contents)


def test_a_place_that_cannot_be_written_to_has_one_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(caches.tempfile, "tempdir", str(tmp_path))
    found = caches.private_folder("things")
    assert found == tmp_path / f"jllm-{os.geteuid()}" / "things"
    assert caches.private_folder("things") == found
    found.chmod(0o777)
    other = caches.private_folder("things")
    assert other != found
    assert other.stat().st_mode & 0o777 == 0o700
