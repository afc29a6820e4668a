"""Jobs killed at any moment: the same line finishes them, with the same bytes, and no input is touched.

JLLM_TEST_SIZE kills of each job; 20 show all moments several times."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

pytest.importorskip("pyspark", reason="pyspark is not installed: pip install .[spark]")
if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
    pytest.skip("no Java: install a JDK of version 17 or newer", allow_module_level=True)

from tests.data.sets import make_set
from tests.spark.lines import contents
from tests.spark.submitted import kill_when, start, wait

KILLS = int(os.environ.get("JLLM_TEST_SIZE", "1"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + 120 * KILLS)]
MOMENTS = (
    ("out/{work}/run.json", 1.0), ("out/{work}/data-*/_temporary/0/*/*/.part*", 0.3), ("out/part-*", 0.02),
    ("out/{work}/data-*/_SUCCESS", 0.5), ("out/{work}/moves.json", 0.05), ("out/_manifest.json", 0.01),
    ("out/{work}/claim", 0.5), ("out/{work}/data-*/_temporary", 1.0), ("out/{work}/manifest.json", 0.02),
)  # fmt: skip
"""What is there before a kill, and how much later it comes at most."""


def killed_and_finished(tmp_path: Path, script: str, words: list[str], work: str) -> None:
    """`words` but for the output, in `tmp_path/first` and in folders that are killed first."""
    done = wait(start(script, [*words, "-o", "first/out"], tmp_path))
    assert done.code == 0, done.err
    expected = contents(tmp_path / "first")
    before = contents(tmp_path / "given")
    draw = random.Random(script)
    landed = 0
    for number in range(KILLS):
        pattern, most = MOMENTS[number % len(MOMENTS)]
        folder = tmp_path / f"k{number}"
        folder.mkdir()
        line = [*words, "-o", f"k{number}/out"]
        landed += kill_when(start(script, line, tmp_path), pattern.format(work=work), folder, draw.uniform(0, most))
        seen = (folder / "out" / work / "claim").exists()
        done = wait(start(script, line, tmp_path))
        assert done.code == 0, done.err
        assert contents(folder) == expected, (pattern, done)
        assert contents(tmp_path / "given") == before
        left = [path for path in tmp_path.iterdir() if path.name.startswith("spark-")]
        assert not seen or not left, "what Spark keeps in its temporary folder, the permutation too, is gone"
        for path in (*left, *tmp_path.glob("blockmgr-*")):
            shutil.rmtree(path)
    assert landed >= KILLS * 2 // 3


def test_raw2ids(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "given").mkdir()
    for number in range(5):
        lines = [json.dumps({"text": f"{number} {i} some text " * 5}) + "\n" for i in range(400)]
        (tmp_path / "given" / f"{number}.jsonl").write_text("".join(lines))
    words = ["-i", "given", "--tokenizer", str(tokenizer), "-t", "pretrain", "--stack", "--max_len", "64"]
    killed_and_finished(tmp_path, "raw2ids.py", [*words, "--partitions", "5"], ".raw2ids")


def test_shuffle(tmp_path: Path) -> None:
    make_set(tmp_path / "given" / "set", 5_000, files=4)
    killed_and_finished(tmp_path, "shuffle.py", ["-d", "given/set", "-n", "5"], ".shuffle")
