"""Which checkpoints stay: the newest, the best, and no others."""

import json
from pathlib import Path

import pytest

from jllm.train.checkpoint.folders import (
    ADAPTER_MARKER,
    INDEX_NAME,
    MODEL_MARKER,
    folder_of_step,
    step_of_folder,
)
from jllm.train.checkpoint.saver import retain


@pytest.mark.parametrize(
    ("losses", "more", "expected"),
    [
        ([None, None, None], {}, [1, 2, 3]),
        ([None, None, None], {"max_num": 2}, [2, 3]),
        ([1.0, 2.0, 3.0], {"best_of": 1}, [1, 3]),  # the newest stays, however bad it is
        ([1.0, 2.0, 3.0, 4.0], {"best_of": 1, "max_num": 2}, [1, 3, 4]),
        ([3.0, 2.0, 1.0], {"best_of": 2}, [2, 3]),
        ([None, 2.0, float("nan"), None], {"best_of": 1}, [2, 4]),
        # Evaluated at steps 1, 4 and 6; those between carry the loss of the evaluation before.
        ([1.0, 1.0, 1.0, 2.0, 2.0, 0.5], {"best_of": 2}, [1, 6]),
        ([1.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0], {"best_of": 2}, [1, 4, 7]),
        ([1.0, 1.0, 1.0], {"best_of": 2}, [1, 3]),
    ],
)
@pytest.mark.parametrize("marker", [INDEX_NAME, MODEL_MARKER, ADAPTER_MARKER])
def test_which_checkpoints_are_kept(
    tmp_path: Path, losses: list[float | None], more: dict[str, int], expected: list[int], marker: str
) -> None:
    """Checkpoints after steps 1, 2, ... that carry these losses."""
    for step, loss in enumerate(losses, 1):
        place = folder_of_step(tmp_path, step)
        place.mkdir()
        (place / MODEL_MARKER).write_text("{}")
        (place / ADAPTER_MARKER).write_text("{}")
        (place / ("index.json" if marker == INDEX_NAME else "evaluation.json")).write_text(
            json.dumps({"eval_loss": loss})
        )
        retain(tmp_path, **{"max_num": 0, "best_of": 0, **more}, marker=marker)
        assert folder_of_step(tmp_path, step).is_dir()
    assert sorted(map(step_of_folder, tmp_path.iterdir())) == expected
