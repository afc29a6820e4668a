"""The output folder of a job: whatever moment a job stops at, the next one ends with the same files."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest

from jllm.data.dataset.manifest import MANIFEST_NAME, Manifest, open_data_set
from jllm.data.spark.files import HadoopFiles
from jllm.data.spark.place import JobPlace, final_name
from jllm.errors import UserError
from tests.data.sets import make_set
from tests.spark.lines import contents

pytestmark = pytest.mark.slow


class StoppedError(Exception):
    """A kill, at a call that changes something."""


class StoppingFiles(HadoopFiles):
    """The real file systems, until so many changes were made."""

    def __init__(self, spark: Any, changes: int) -> None:
        super().__init__(spark)
        self._left = changes

    def _asked(self, path: str, question: Any) -> Any:
        if question.__name__ in ("move", "put") or "delete" in question.__code__.co_names:
            self._left -= 1
            if self._left < 0:
                raise StoppedError
        return super()._asked(path, question)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """What Spark may have written: files, and the manifest that describes them."""
    top = tmp_path_factory.mktemp("written")
    make_set(top / "set", 20, 3)
    staged = top / "staged"
    staged.mkdir()
    for number, path in enumerate(sorted((top / "set").rglob("*.parquet"))):
        shutil.copy(path, staged / f"part-{number:05d}-0a1b-c000.zstd.parquet")
    described = open_data_set(staged).manifest
    return staged, described


def run(files: HadoopFiles, output: Path, written: tuple[Path, Manifest], *, clean: bool = False) -> None:
    """As the jobs go about it."""
    place = JobPlace(files, str(output), work=".work", command="join")
    with place.held():
        if clean:
            place.clean()
        if place.manifest() is not None:
            return
        pending = place.pending()
        if place.begun() is not None and pending is not None:
            place.move(pending)
            return
        if pending is not None:
            place.clean()
        staged = place.begin({"plan": 1})
        shutil.copytree(written[0], staged.removeprefix("file:"))
        place.finish(staged, written[1], "zstd")


@pytest.mark.parametrize("clean", [False, True])
def test_any_moment(
    spark: Any, tmp_path: Path, written: tuple[Path, Manifest], clean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with -C on a finished set: then nothing of the old one is taken for the new one."""
    monkeypatch.setattr("jllm.data.spark.claim.SETTLE", 0.0)
    begun = itertools.count()  # as if each were a process of its own
    monkeypatch.setattr("jllm.data.spark.claim.started_at", lambda pid: str(next(begun)))
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "mine").write_text("x")
    run(HadoopFiles(spark), tmp_path / "first", written)
    expected = contents(tmp_path / "first")
    assert {name for name in expected if name.endswith(".parquet")} == {f"part-{n:05d}.zstd.parquet" for n in range(3)}
    for changes in range(60):
        output = tmp_path / f"stopped {changes}"
        if clean:
            shutil.copytree(tmp_path / "first", output)
        else:
            output.mkdir()
            (output / "mine").write_text("x")
        try:
            run(StoppingFiles(spark, changes), output, written, clean=clean)
            stopped = False
        except StoppedError:
            stopped = True
        run(HadoopFiles(spark), output, written, clean=clean and changes % 2 == 0)
        assert contents(output) == expected, changes
        if not stopped:
            break
    assert not stopped
    assert changes > 5


def test_nothing_is_removed_through_a_link(spark: Any, tmp_path: Path, written: tuple[Path, Manifest]) -> None:
    run(HadoopFiles(spark), tmp_path / "other", written)
    before = contents(tmp_path / "other")
    (tmp_path / "out").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="is a link"):
        run(HadoopFiles(spark), tmp_path / "out", written, clean=True)
    assert contents(tmp_path / "other") == before
    (tmp_path / "new").mkdir()
    name = JobPlace(HadoopFiles(spark), str(tmp_path / "new"), work=".work", command="x").work.rpartition("/")[2]
    (tmp_path / "new" / name).symlink_to(tmp_path / "other")
    with (
        pytest.raises(UserError, match=r"-o .*: \.work in it is a link"),
        JobPlace(HadoopFiles(spark), str(tmp_path / "new"), work=".work", command="x").held(),
    ):
        pass
    assert contents(tmp_path / "other") == before


def test_a_mistake_leaves_nothing(spark: Any, tmp_path: Path, written: tuple[Path, Manifest]) -> None:
    place = JobPlace(HadoopFiles(spark), str(tmp_path / "deep" / "out"), work=".work", command="x")

    def go_wrong(*, begins: bool) -> None:
        with place.held():
            if begins:
                Path(place.begin({}).removeprefix("file:")).mkdir()
            raise UserError("wrong")

    for begins in (False, True):
        with pytest.raises(UserError, match="wrong"):
            go_wrong(begins=begins)
        assert not contents(tmp_path)


def test_another_command_is_left(spark: Any, tmp_path: Path) -> None:
    make_set(tmp_path / "out", 9)
    before = contents(tmp_path)
    place = JobPlace(HadoopFiles(spark), str(tmp_path / "out"), work=".work", command="spark_jobs/raw2ids")
    with pytest.raises(UserError, match="--clean removes only what"), place.held():
        place.clean()
    assert contents(tmp_path) == before
    manifest = place.manifest()
    assert manifest is not None
    assert place.changed(manifest) is None
    (tmp_path / "out" / manifest.files[0].path).write_bytes(b"")
    assert place.changed(manifest) == manifest.files[0].path
    (tmp_path / "out" / MANIFEST_NAME).write_text("{}")
    with pytest.raises(UserError):
        place.manifest()


def test_a_temporary_folder_of_another_job(spark: Any, tmp_path: Path) -> None:
    (tmp_path / "_temporary").mkdir()
    with pytest.raises(UserError, match="holds _temporary, which another Spark job"):
        JobPlace(HadoopFiles(spark), str(tmp_path), work=".work", command="x").shards()


def test_names() -> None:
    assert final_name("part-00012-1b-2c-c000.zstd.parquet", "zstd") == "part-00012.zstd.parquet"
    assert final_name("part-00012-1b-2c-c003.lz4raw.parquet", "lz4") == "part-00012-00003.lz4.parquet"
