"""A run left alone: one line, started again and again, through what happens on clusters; in full in benchmarks."""

import os
from pathlib import Path

from benchmarks.three_weeks import ThreeWeeks

SIZE = int(os.environ.get("JLLM_TEST_SIZE", "1"))


def test_no_event_needs_a_hand(tmp_path: Path) -> None:
    """The losses of all steps are those of a run that nothing happened to."""
    run = ThreeWeeks(tmp_path, events=3 * SIZE, seed=4, steps_per_event=25)
    if SIZE == 1:  # those that no other test shows
        run.left = ["a byte of the newest checkpoint flips", "the disk is full for a while", "a rank stands still"]
    result = run.run()
    print(result)
    assert result.identical, (tmp_path / "place/output").read_text()[-3000:]
    assert result.asked_for_a_person == 0
    assert sum(result.events.values()) == 3 * SIZE
