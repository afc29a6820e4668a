"""One job at a time in a folder: the living are respected, the dead are not waited for."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jllm.data.spark import claim
from jllm.data.spark.files import HadoopFiles
from jllm.errors import UserError

pytestmark = pytest.mark.slow


def write(path: Path, **other: Any) -> None:
    mine = {"job": "x", "host": os.uname().nodename, "boot": claim._boot(), "beat": 0, "processes": []}
    path.write_text(json.dumps(mine | other))


def held(spark: Any, path: Path, **more: Any) -> Any:
    return claim.held(HadoopFiles(spark), f"file:{path}", "out", **more)


def test_a_second_job_is_refused(spark: Any, tmp_path: Path) -> None:
    with held(spark, tmp_path / "claim"), pytest.raises(UserError, match=r"^-o out: another run is writing there"):  # noqa: SIM117
        with held(spark, tmp_path / "claim"):
            pass


def test_it_is_touched(spark: Any, tmp_path: Path) -> None:
    with held(spark, tmp_path / "claim", beat=0.05):
        until = time.monotonic() + 20
        while json.loads((tmp_path / "claim").read_text())["beat"] < 2 and time.monotonic() < until:
            time.sleep(0.02)
        assert json.loads((tmp_path / "claim").read_text())["beat"] >= 2


def test_the_dead_are_not_waited_for(spark: Any, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for processes in ([[ended.pid, "1"]], [[os.getpid(), "an earlier process of this number"]], []):
        write(tmp_path / "claim", processes=processes)
        begun = time.monotonic()
        with held(spark, tmp_path / "claim"):
            assert json.loads((tmp_path / "claim").read_text())["job"] != "x"
        assert time.monotonic() - begun < claim.STALE / 2
    (tmp_path / "claim").write_text("{")
    with held(spark, tmp_path / "claim"):
        pass


def test_a_half_that_dies_is_waited_for(spark: Any, tmp_path: Path) -> None:
    """The driver is gone, and the JVM that writes for it ends a little later."""
    jvm = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
    write(tmp_path / "claim", processes=[[1 << 30, "1"], [jvm.pid, claim.started_at(jvm.pid)]])
    reaper = subprocess.Popen.wait
    import threading

    threading.Thread(target=reaper, args=(jvm,), daemon=True).start()
    with held(spark, tmp_path / "claim"):
        assert claim.started_at(jvm.pid) is None


def test_of_another_machine(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Touched while it is looked at: alive. Not touched for long enough: gone."""
    import threading

    monkeypatch.setattr(claim, "STALE", 3.0)
    write(tmp_path / "claim", host="elsewhere")
    threading.Timer(1.0, lambda: write(tmp_path / "claim", host="elsewhere", beat=1)).start()
    with pytest.raises(UserError, match="another run"), held(spark, tmp_path / "claim"):
        pass
    with held(spark, tmp_path / "claim"):
        pass


def test_scratch_of_the_dead_is_removed(spark: Any, tmp_path: Path) -> None:
    """Folders that a JVM called so, and nothing else that a claim may name."""
    name = "spark-01234567-89ab-cdef-0123-456789abcdef"
    for folder in (name, "mine", f"link/{name}"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_text("x")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / name).symlink_to(tmp_path / "mine")
    scratch = [str(tmp_path / each) for each in (name, "mine", f"deep/{name}")]
    write(tmp_path / "claim", scratch=scratch)
    with held(spark, tmp_path / "claim"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["claim", "deep", "link", "mine"]
    assert (tmp_path / "mine" / "file").is_file()
