"""The same inputs through the local command and the Spark job: exit code, counts, bad records, what is left behind.

How many are tried is up to JLLM_TEST_SIZE; 10 for each, 60 for 6."""

import os
import random
from pathlib import Path
from typing import Any

import pytest

from jllm.commands.raw2ids import main as local_command
from tests.bad_inputs import Case, all_cases, good
from tests.spark.lines import contents, found, run_line

pytestmark = pytest.mark.slow
SIZE = int(os.environ.get("JLLM_TEST_SIZE", "1"))
SPARK_REFUSES = ("pipe", "name b'_b", "name b'.b", "name b'.jsonl", "name b'\\xff", "ids", "wrong labels")
"""What Spark cannot name or read, or what the job refuses by name: it must say so, and leave nothing."""


def cases() -> list[Case]:
    """A sample of all bad inputs of raw2ids that need no other user."""
    fit = [case for case in all_cases() if case.command == "raw2ids" and not case.bare]
    random.Random(5).shuffle(fit)
    return fit[: 10 * SIZE]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name.encode("unicode_escape").decode()[:60])
def test_an_odd_input(spark: Any, tokenizer: Path, tmp_path: Path, case: Case) -> None:
    from spark_jobs.raw2ids import LOCAL_ONLY
    from spark_jobs.raw2ids import main as spark_command

    ends, left, facts = {}, {}, {}
    for which, command in (("local", local_command), ("spark", spark_command)):
        folder = tmp_path / which / "x"
        good(folder)
        case.make(folder)
        there = contents(folder)
        before = {name: what for name, what in there.items() if not name.startswith("out/.raw2ids")}
        words = [word.replace("{folder}", str(folder)) for word in case.words]
        more = ["--cores", "1"] if which == "local" else []
        ends[which] = run_line(command, ["--tokenizer", str(tokenizer), *more, *words])
        after = contents(folder)
        ours = {name for name in after if name.split("/")[0] == "out"} - there.keys()
        assert {name: after.get(name) for name in before} == before, "no file that was there has changed"
        left[which] = {name.split("/")[0] for name in after.keys() - there.keys()}
        facts[which] = found(folder / "out")
        if which == "spark" and ends["spark"].code:
            assert not ours, ours
    local, spark_end = ends["local"], ends["spark"]
    assert spark_end.mistake or spark_end.out
    if local.code != spark_end.code:
        refused = {f"--{name}" for name in LOCAL_ONLY} & set(case.words)
        assert refused or any(word in case.name for word in SPARK_REFUSES), (local, spark_end)
        assert spark_end.code == 2
        return
    assert facts["local"] == facts["spark"]
    if local.code == 0:
        assert left["local"] == left["spark"]
