"""What cannot come to anything is refused at the start: one line, exit code 2, in a dry run and in a run alike.

JLLM_TEST_SIZE says how many are tried: about 40, all of them from 5 on.
"""

import contextlib
import io
import os
from pathlib import Path

import pytest

from tests.distributed.ranks import Ranks
from tests.train.checks.bad_starts import BOTH, DRY, RUN, all_starts, good

STARTS = all_starts()[: 42 * int(os.environ.get("JLLM_TEST_SIZE", "1"))]


def start(words: list[str]) -> tuple[int, str]:
    """Exit code and standard error of the trainer's command in this process; what it does not catch is raised."""
    from jllm.options import command
    from jllm.parallel import peers
    from jllm.train.config import TrainConfig
    from jllm.train.trainer import run

    err, code = io.StringIO(), 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            command(TrainConfig, name="train_pipe")(run).main(words)
        except SystemExit as end:
            code = int(end.code or 0)
            peers.may_speak()
    return code, err.getvalue()


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def try_all(folder: Path) -> list[str]:
    """What went wrong, one line each."""
    good(folder)
    wrong = []
    for bad in STARTS:
        if bad.make is not None:
            bad.make(folder)
    before = everything(folder)
    for bad in STARTS:
        words = ["-m", str(folder / "model"), "--precision", "fp32"]
        if "--train_data" not in bad.words:
            words += ["--train_data", str(folder / "data")]
        words += [word.replace("{folder}", str(folder)) for word in bad.words]
        if "--max_steps" not in words and "--num_train_epochs" not in words:
            words += ["--max_steps", "2"]
        said = {}
        for where, more in ((DRY, ["--dry_run"]), (RUN, [])):
            if bad.where not in (where, BOTH):
                continue
            try:
                code, err = start([*words, *more])
            except BaseException as error:
                wrong.append(f"{bad.name}: {where} raises {type(error).__name__}: {error}")
                continue
            said[where] = [line for line in err.splitlines() if line.startswith("error: ")]
            if code != 2 or len(said[where]) != 1 or "Traceback" in err or bad.said not in err:
                wrong.append(f"{bad.name}: {where} ends with {code} and says {err[-600:]!r}")
        if bad.where == BOTH and said.get(DRY) != said.get(RUN):
            wrong.append(f"{bad.name}: dry run and run differ: {said}")
        if (left := everything(folder) - before) and not all("/log" in name for name in left):
            wrong.append(f"{bad.name}: left {sorted(left)[:3]}")
            before |= left
    return wrong


@pytest.mark.timeout(600)
def test_bad_starts_are_one_line(tmp_path: Path) -> None:
    [wrong] = Ranks(1).run(try_all, tmp_path, timeout=500)
    assert wrong == []
