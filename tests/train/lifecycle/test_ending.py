"""Exit codes: one for each thing that a scheduler does next."""

import pytest

from jllm.train.lifecycle.ending import Ending


@pytest.mark.parametrize(
    ("ending", "saved", "lost"),
    [
        (Ending.COMPLETE, 0, 0),
        (Ending.EARLY_STOP, 0, 0),
        (Ending.SAVE_QUIT, 0, 0),
        (Ending.TIME_LIMIT, 75, 143),
        (Ending.SIGTERM, 75, 143),
        (Ending.INTERRUPT, 130, 130),
    ],
)
def test_codes(ending: Ending, saved: int, lost: int) -> None:
    assert [ending.exit_code(is_saved=True), ending.exit_code(is_saved=False)] == [saved, lost]
    assert ending.is_done == (saved == 0)
