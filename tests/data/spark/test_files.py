"""Files on the file systems of Hadoop: the local one, and one that is not this machine's by its name."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jllm.data.dataset.files import footer_of
from jllm.data.spark.files import HadoopFiles, joined
from jllm.errors import UserError
from tests.security.hostile import plant_link
from tests.spark.file_systems import mounted

pytestmark = pytest.mark.slow


@pytest.fixture(params=["local", "another"])
def place(request: pytest.FixtureRequest, spark: Any, tmp_path: Path) -> tuple[HadoopFiles, str]:
    return HadoopFiles(spark), str(tmp_path) if request.param == "local" else mounted(spark, tmp_path)


@pytest.mark.parametrize("name", ["a", "a b", "é日", "a%41", "a#b", "[a]{b}"])
def test_files_of_any_name(place: tuple[HadoopFiles, str], name: str) -> None:
    files, top = place
    path = joined(files.qualified(top), name, "f")
    assert files.status(path) is None
    assert files.write(path, "é\n")
    assert not files.write(path, "other", replace=False)
    assert files.read(path) == "é\n"
    files.write(path, "more")
    status = files.status(path)
    assert status is not None
    assert (status.size, status.is_folder) == (4, False)
    assert [one.path for one in files.below(files.qualified(top))] == [status.path]
    assert not files.remove_if_empty(joined(files.qualified(top), name))
    files.rename(path, path + "2")
    files.remove(path + "2")
    files.remove(path + "2")
    assert files.remove_if_empty(joined(files.qualified(top), name))


def test_a_planted_temporary_name_is_not_written_through(spark: Any, tmp_path: Path) -> None:
    target = plant_link(tmp_path / "out" / ".f.tmp", tmp_path / "precious")
    files = HadoopFiles(spark)
    assert files.write(joined(files.qualified(str(tmp_path)), "out", "f"), "ours")
    assert (tmp_path / "out" / "f").read_text(encoding="utf-8") == "ours"
    assert target.read_text(encoding="utf-8") == "precious"


def test_footers(place: tuple[HadoopFiles, str], tmp_path: Path) -> None:
    files, top = place
    pq.write_table(pa.table({"a": list(range(99))}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR")
    path = joined(files.qualified(top), "a.parquet")
    status = files.status(path)
    assert status is not None
    assert files.footer_of(path, status.size) == footer_of(tmp_path / "a.parquet")
    assert files.footer_of(joined(files.qualified(top), "b.parquet"), 3) is None


def test_patterns(place: tuple[HadoopFiles, str]) -> None:
    files, top = place
    whole = files.qualified(top)
    for name in ("b1", "a1", "a2"):
        files.write(joined(whole, name), "")
    assert [one.path.rsplit("/", 1)[-1] for one in files.matching(joined(whole, "a*"))] == ["a1", "a2"]


def test_paths_are_of_this_process(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/er")
    files = HadoopFiles(spark)
    assert files.qualified("x y") == f"file:{tmp_path}/x y"
    assert files.qualified("link/../x") == f"file:{tmp_path}/deep/x"


def test_mistakes_name_the_path(spark: Any, tmp_path: Path) -> None:
    files = HadoopFiles(spark)
    (tmp_path / "file").write_text("x")
    for act in (lambda path: files.write(path, ""), files.read, files.make_folder, files.inside):
        with pytest.raises(UserError, match="file/deep"):
            act(f"file:{tmp_path}/file/deep/x")
    for odd in ("nosuch://host/x", "\udcff"):
        with pytest.raises(UserError):
            files.status(odd)
