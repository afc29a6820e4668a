"""Which files an input names."""

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.sources.chunks import read_chunks
from jllm.data.sources.inputs import resolve, safe, stem_of, without_password
from jllm.data.sources.parsing import parse_chunk
from jllm.errors import UserError


def test_folders_globs_and_urls(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / ".hidden").mkdir()
    for name in ("b.jsonl", "a.txt", "deep/c.jsonl.gz", "notes.pdf", ".hidden/d.txt", "_e.txt"):
        (tmp_path / "in" / name).write_bytes(b"")
    assert [source.name for source in resolve([str(tmp_path / "in")])] == ["a.txt", "b.jsonl", "deep/c.jsonl.gz"]
    assert [source.name for source in resolve([str(tmp_path / "in" / "*.jsonl")])] == ["b.jsonl"]
    url = f"file://{tmp_path}/in/*.jsonl"
    assert [source.name for source in resolve([url])] == ["b.jsonl"]
    (tmp_path / "in" / "b.jsonl").write_text('{"text": "x"}')
    (source,) = resolve([url])
    assert [parse_chunk(block, source.kind).values for block in read_chunks(source, 0)] == [[{"text": "x"}]]
    for wrong in ("nowhere", "no*where", f"file://{tmp_path}/nowhere"):
        with pytest.raises(UserError):
            resolve([str(tmp_path / wrong) if "://" not in wrong else wrong])
    with pytest.raises(UserError, match="twice"):
        resolve([str(tmp_path / "in"), str(tmp_path / "in" / "a.txt")])


@pytest.mark.parametrize(
    ("name", "kind", "compression", "stem"),
    [
        ("a.jsonl", "jsonl", None, "a"),
        ("a.b.NDJSON.GZ", "jsonl", "gzip", "a.b"),
        ("a.md.zst", "text", "zstd", "a"),
        ("a.json.xz", "json", "xz", "a"),
        ("a.parquet", "parquet", None, "a"),
        ("a.text.bz2", "text", "bz2", "a"),
    ],
)
def test_names_say_what_a_file_is(tmp_path: Path, name: str, kind: str, compression: str | None, stem: str) -> None:
    (tmp_path / name).write_bytes(b"12345")
    (source,) = resolve([str(tmp_path / name)])
    assert (source.kind, source.compression, source.stem, source.size) == (kind, compression, stem, 5)
    (overruled,) = resolve([str(tmp_path / name)], kind="text")
    assert overruled.kind == "text"


def test_passwords_are_not_shown() -> None:
    url = "s3://user:secret@host/folder/a.jsonl?token=hidden"
    assert without_password(url) == "s3://host/folder/a.jsonl"
    assert without_password("plain/path?x") == "plain/path?x"
    assert safe(ValueError(f"cannot open {url}")) == "cannot open s3://host/folder/a.jsonl?token=hidden"


EXAMPLES = 60 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=70)


@settings(max_examples=EXAMPLES, deadline=None)
@given(name=names | st.sampled_from(["_a", "._a", "__", ".", "a\nb", "\x1b[31m", "é" * 100, "\udcff\udcfe"]))
def test_no_split_is_called_so_that_readers_pass_it_over(name: str) -> None:
    stem = stem_of(f"{name}.jsonl")
    assert stem
    assert stem[0] not in "_."
    assert stem.isprintable() or not stem.isascii()
    assert not set(stem) & set("\n\r\x1b\x7f/")
    assert len(stem.encode()) <= 160
    if name.isalnum() and name.isascii():
        assert stem == name


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_every_file_is_found_once_behind_any_links(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Folders in folders, some of them behind links, some links back: each file once, never without end."""
    top = tmp_path_factory.mktemp("top")
    folders = [top / "in", top / "beside"]
    for folder in folders:
        folder.mkdir()
    for number in range(data.draw(st.integers(0, 4))):
        folders.append(data.draw(st.sampled_from(folders)) / f"d{number}")
        folders[-1].mkdir()
    for number, place in enumerate(data.draw(st.lists(st.sampled_from(folders), min_size=1, max_size=5))):
        (place / f"f{number}.jsonl").touch()
    (top / "in" / "first.jsonl").touch()
    for number, (place, target) in enumerate(
        data.draw(st.lists(st.tuples(st.sampled_from(folders), st.sampled_from(folders)), max_size=4))
    ):
        (place / f"l{number}").symlink_to(target)
    found = [os.path.realpath(source.path) for source in resolve([str(top / "in")])]
    reached, pending = set(), [top / "in"]
    while pending:
        place = pending.pop().resolve()
        if place not in reached:
            reached.add(place)
            pending += [each for each in place.iterdir() if each.is_dir()]
    wanted = [str(file) for place in reached for file in place.glob("*.jsonl")]
    assert sorted(found) == sorted(wanted)


def test_what_is_no_file_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").touch()
    monkeypatch.chdir(tmp_path / "in")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("s.jsonl")
    Path("nowhere.jsonl").symlink_to("not there")
    Path("loop.jsonl").symlink_to("loop.jsonl")
    os.mkfifo("p.jsonl")
    for name in ("nowhere.jsonl", "loop.jsonl", "p.jsonl", "s.jsonl"):
        for other in ("nowhere.jsonl", "loop.jsonl", "p.jsonl", "s.jsonl"):
            if other != name:
                os.rename(other, f"{other}.off")
        for words in (".", "*.jsonl"):
            with pytest.raises(UserError, match=name):
                resolve([words])
        for hidden in Path(".").glob("*.off"):
            hidden.rename(hidden.stem)
    (pipe,) = resolve(["p.jsonl"])
    assert pipe.once
    assert pipe.size is None


@pytest.mark.parametrize("mark", ["_manifest.json", ".raw2ids"])
def test_data_sets_inside_an_input_are_passed_over_and_said_so(tmp_path: Path, mark: str) -> None:
    for place in ("a", "set/set-00000", "deep/set/x"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "f.jsonl").touch()
    for place in ("set", "deep/set"):
        (tmp_path / place / mark).mkdir()
    for words in (str(tmp_path), f"{tmp_path}/**/*.jsonl", f"file://{tmp_path}"):
        said: list[str] = []
        (tmp_path / "set" / mark / "x.jsonl").touch()
        (tmp_path / "deep" / "set" / mark / "x.jsonl").touch()
        found = resolve([words], passed_over=[mark], say=said.append)
        assert [source.path.rsplit("/", 2)[-2:] for source in found] == [["a", "f.jsonl"]]
        assert len(said) == 1
        assert "set and 1 more" in said[0]
    assert len(resolve([str(tmp_path / "set")], passed_over=[mark], say=said.append)) == 1
    (tmp_path / "a" / "f.jsonl").unlink()
    with pytest.raises(UserError, match="data sets of ours"):
        resolve([str(tmp_path)], passed_over=[mark], say=said.append)
