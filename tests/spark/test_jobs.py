"""Both Spark jobs: mistakes that are found before Spark starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyspark", reason="pyspark is not installed: pip install .[spark]")
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
