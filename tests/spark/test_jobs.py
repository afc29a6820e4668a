"""Both Spark jobs as people start them: mistakes that are found before Spark starts, and what is seen of the rest."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyspark", reason="pyspark is not installed: pip install .[spark]")
from tests.spark.submitted import start, wait

ROOT = Path(__file__).parents[2]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    """Found before Spark starts."""
    for script, arguments, said in (
        ("raw2ids.py", ["-i", "x", "-o", "y", "--tokenizer", "z", "-n", "5"], "--num"),
        ("raw2ids.py", ["-i", "x", "--tokenizer", "z"], "-o"),
        ("shuffle.py", ["-d", "x", "-o", "y", "-n", "0"], "--num_block 0"),
    ):
        done = subprocess.run(
            [sys.executable, str(ROOT / "spark_jobs" / script), *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None and "JAVA_HOME" not in os.environ, reason="no Java")
def test_what_a_person_sees(tmp_path: Path, tokenizer: Path) -> None:
    """The error is one line on standard error, the last one; a result is all that is on standard output."""
    (tmp_path / "bad.jsonl").write_text('{"text": null}\n' * 50 + '{"text": "good"}\n' * 50)
    words = ["-i", "bad.jsonl", "-o", "out", "--tokenizer", str(tokenizer), "-t", "pretrain"]
    done = wait(start("raw2ids.py", words, tmp_path))
    assert done.code == 2
    assert done.out == ""
    assert done.err.splitlines()[-1].startswith("error: 50 of 100 records are bad (empty document: 50; bad.jsonl:1: ")
    assert not re.search("Traceback|ERROR|FutureWarning|Exception", done.err), done.err
    assert not (tmp_path / "out").exists()
    done = wait(start("raw2ids.py", [*words, "--on_error", "skip"], tmp_path))
    assert done.code == 0
    assert done.out.startswith("out: finished in ")
    assert not re.search("Traceback|ERROR|FutureWarning|Exception", done.err), done.err
