"""Some runs of every fuzz target; `make fuzz` makes many more."""

import os

import pytest

from tests.security.fuzz.harness import Target, run_target
from tests.security.fuzz.targets import TARGETS

RUNS = 25 * int(os.environ.get("JLLM_TEST_SIZE", "1"))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_readers_end_in_a_value_or_a_line(target: Target) -> None:
    runs, found = run_target(target, 0, 60, most=RUNS)
    assert not found
    assert runs == RUNS


def test_a_file_that_swells_is_read_in_time() -> None:
    """100 KB that become half a million bad lines, by seed and number: read in six formats they took 31 seconds."""
    target = next(each for each in TARGETS if each.name == "gzip")
    runs, found = run_target(target, 22, 60, first=866, most=1)
    assert (runs, found) == (1, [])
