"""Every way a run ends: what is saved, the exit code, and what the same line does then."""

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jllm.train.checkpoint.folders import list_checkpoints
from tests.distributed.ranks import Ranks
from tests.distributed.runs import logged_options, records
from tests.fixtures import random_rows, tiny_llama, write_rows

STEPS = 8
SIGNAL_STEP = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("endings")
    tiny_llama(folder / "model", tied=True)
    write_rows(folder / "data", random_rows(48, labels=True), files=3)
    write_rows(folder / "eval", random_rows(6, labels=True), files=1)
    return folder


def ended(options: dict[str, Any], console: Path, signals: dict[int, list[int]] | None = None) -> tuple[int, str]:
    """One rank of a run: its exit code and its mistake. `signals`: rank → what it gets while step 3 is made."""
    from jllm.errors import UserError
    from jllm.parallel import peers
    from jllm.train import trainer
    from jllm.train.config import TrainConfig

    rank = int(os.environ["RANK"])
    make_step = trainer.TrainingRun._train_step

    def signalled(self: Any, steps: Any) -> None:
        if self.step + 1 == SIGNAL_STEP:
            for number in (signals or {}).get(rank, []):
                os.kill(os.getpid(), number)
                time.sleep(0.3)  # for the thread that takes it
        make_step(self, steps)

    trainer.TrainingRun._train_step = signalled  # type: ignore[method-assign]
    place = console if rank == 0 else Path(os.devnull)
    with place.open("a", buffering=1) as file, contextlib.redirect_stdout(file):
        try:
            return trainer.run(TrainConfig(**options)), ""
        except UserError as error:
            peers.may_speak()
            return error.exit_code, str(error)


def options_in(folder: Path, place: Path, **more: Any) -> dict[str, Any]:
    settings = {"max_steps": STEPS, "checkpoint": place / "ckpt", "steps_per_checkpoint": 100, "resume_ckpt": "auto"}
    return logged_options(folder, place, **{**settings, **more})


def losses(place: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records(place / "log")]


def saved(place: Path) -> list[str]:
    return [path.name for path in list_checkpoints(place / "ckpt")]


@pytest.fixture(scope="module")
def straight(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    place = tmp_path_factory.mktemp("straight")
    group = Ranks(2)
    assert group.run(ended, options_in(folder, place), place / "console") == [(0, "")] * 2
    return losses(place)


@pytest.mark.parametrize(
    ("signals", "code", "said"),
    [
        ({0: [signal.SIGTERM]}, 75, "SIGTERM: the run ends after step 3"),
        ({1: [signal.SIGTERM]}, 75, "SIGTERM: the run ends after step 3"),
        ({0: [signal.SIGTERM], 1: [signal.SIGTERM, signal.SIGTERM]}, 75, "SIGTERM: the run ends after step 3"),
        ({0: [signal.SIGINT], 1: [signal.SIGINT, signal.SIGTERM]}, 130, "Ctrl-C: the run ends after step 3"),
    ],
)
def test_signals(
    ranks: Callable[[int], Ranks],
    folder: Path,
    straight: list[tuple[int, float]],
    tmp_path: Path,
    signals: dict[int, list[int]],
    code: int,
    said: str,
) -> None:
    """One process that is asked to end is enough; the same line goes on exactly."""
    options, console = options_in(folder, tmp_path, output_dir=tmp_path / "out"), tmp_path / "console"
    found = ranks(2).run(ended, options, console, signals)
    assert found == [(code, "")] * 2
    # A signal is taken beside the step: the requests of this step may have been sent before.
    assert saved(tmp_path) in (["step-00000003"], ["step-00000004"])
    assert said.replace("3", saved(tmp_path)[0][-1]) in console.read_text()
    assert not (tmp_path / "out/config.json").exists()
    assert ranks(2).run(ended, options, console) == [(0, "")] * 2
    assert losses(tmp_path) == straight
    assert (tmp_path / "out/config.json").exists()


def test_without_checkpoints_nothing_is_saved(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        options = options_in(folder, tmp_path, checkpoint=None, resume_ckpt=None, log_dir=tmp_path / f"log-{code}")
        assert ranks(2).run(ended, options, tmp_path / "console", {0: [number]}) == [(code, "")] * 2
    assert "nothing is saved" in (tmp_path / "console").read_text()


def test_time_limit(
    ranks: Callable[[int], Ranks], folder: Path, straight: list[tuple[int, float]], tmp_path: Path
) -> None:
    """It saves after its first step, and leaves; without a limit, the same line makes the rest."""
    options = options_in(folder, tmp_path, time_limit="1h")
    assert ranks(2).run(aged, options, tmp_path / "console") == [(75, "")] * 2
    assert saved(tmp_path) == ["step-00000001"]
    assert "time limit: the run ends after step 1" in (tmp_path / "console").read_text()
    options = {**options, "time_limit": None}
    assert ranks(2).run(ended, options, tmp_path / "console") == [(0, "")] * 2
    assert losses(tmp_path) == straight


def aged(options: dict[str, Any], console: Path) -> tuple[int, str]:
    """A run of processes that were started an hour ago."""
    from jllm.train.lifecycle import requests

    requests.process_seconds = lambda: 3600.0
    return ended(options, console)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_loss_that_is_not_finite(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path, policy: str) -> None:
    """The state before is saved; the same line stops there again, in the same words; a change of policy goes on."""
    options = options_in(folder, tmp_path, on_nan=policy, max_steps=14)
    first = ranks(2).run(overflowing, options, tmp_path / "console")
    assert first[0] == first[1]
    code, said = first[0]
    assert code == 3
    assert said.endswith("the state after step 2 is saved")
    assert said.startswith("step 3: loss" if policy == "stop" else "step 12: loss")
    assert saved(tmp_path) == ["step-00000002"]
    assert ranks(2).run(overflowing, options, tmp_path / "console") == first
    assert saved(tmp_path) == ["step-00000002"]
    if policy == "stop":
        skipped = {**options, "on_nan": "skip", "max_steps": 5}
        assert ranks(2).run(overflowing, skipped, tmp_path / "console") == [(0, "")] * 2
        assert [record["loss"] for record in records(tmp_path / "log")][2:] == ["inf"] * 3


def overflowing(options: dict[str, Any], console: Path) -> tuple[int, str]:
    """A run whose losses, and with them all gradients, overflow from the third step on."""
    from jllm.train import trainer

    make_step, step_scale = trainer.TrainingRun._train_step, trainer.step_scale

    def made(self: Any, steps: Any) -> None:
        factor = float("inf") if self.step >= 2 else 1.0
        trainer.step_scale = lambda **given: factor * step_scale(**given)
        make_step(self, steps)

    trainer.TrainingRun._train_step = made  # type: ignore[method-assign]
    return ended(options, console)


def test_data_that_is_damaged_meanwhile(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """The steps before the damage are saved, in one line; mended, the same line goes on exactly."""
    write_rows(tmp_path / "data", random_rows(16), files=2)  # read anew in each epoch of four steps
    more = {"train_data": (str(tmp_path / "data"),), "no_shuf": True, "num_workers": 0}
    whole = options_in(folder, tmp_path / "whole", **more)
    (tmp_path / "whole").mkdir()
    assert ranks(2).run(ended, whole, tmp_path / "console") == [(0, "")] * 2
    shard = sorted((tmp_path / "data").rglob("*.parquet"))[1]
    good = shard.read_bytes()
    options = options_in(folder, tmp_path, **more)
    first = ranks(2).run(damaged_meanwhile, options, tmp_path / "console", shard)
    assert first[0] == first[1]
    assert first[0][0] == 3
    assert first[0][1].startswith(f"{shard}: row group 0 is damaged")
    assert first[0][1].endswith("the state after step 4 is saved")
    assert saved(tmp_path) == ["step-00000004"]
    again = ranks(2).run(ended, options, tmp_path / "console")
    assert all(code in (2, 3) and said.startswith(f"{shard}: row group 0 is damaged") for code, said in again)
    assert saved(tmp_path) == ["step-00000004"]
    shard.write_bytes(good)
    assert ranks(2).run(ended, options, tmp_path / "console") == [(0, "")] * 2
    assert losses(tmp_path) == losses(tmp_path / "whole")


def damaged_meanwhile(options: dict[str, Any], console: Path, shard: Path) -> tuple[int, str]:
    """A run on data of which a file is damaged after the start, before it is read."""
    from jllm.train import trainer

    make_step = trainer.TrainingRun._train_step

    def damaging(self: Any, steps: Any) -> None:
        if self.step == 1 and os.environ["RANK"] == "0":
            with shard.open("r+b") as file:
                file.seek(40)
                file.write(bytes(10))
        make_step(self, steps)

    trainer.TrainingRun._train_step = damaging  # type: ignore[method-assign]
    return ended(options, console)


def test_early_stop_is_an_end(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """A rate at which the loss grows: the run stops, exports the best weights, and says so when started again."""
    more = {"eval_data": (str(folder / "eval"),), "early_stop": 2, "learning_rate": 0.3, "optimizer": "sgd"}
    more |= {"steps_per_eval": 1.0, "gradient_clipping": 0.0, "steps_per_checkpoint": 1, "best_of": 1, "export": "best"}
    options = options_in(folder, tmp_path, **more, output_dir=tmp_path / "out", max_steps=40)
    console = tmp_path / "console"
    assert ranks(2).run(ended, options, console) == [(0, "")] * 2
    made = losses(tmp_path)
    assert 0 < len(made) < 40
    evaluations = {record["step"]: record["eval_loss"] for record in records(tmp_path / "log", "eval_loss")}
    assert "early stop: the evaluation loss rose 2 times in a row" in console.read_text()
    best = min(list(evaluations)[1:], key=evaluations.__getitem__)
    assert f"exporting step-{best:08d}, the best evaluated checkpoint" in console.read_text()
    before = (tmp_path / "out/config.json").stat().st_mtime_ns
    console.unlink()
    assert ranks(2).run(ended, options, console) == [(0, "")] * 2
    assert "the run stopped early (more --early_stop goes on): nothing is left to train" in console.read_text()
    assert losses(tmp_path) == made
    assert (tmp_path / "out/config.json").stat().st_mtime_ns == before
    # The exported weights are those of the best evaluation: evaluated anew they give its loss.
    again = {**more, "model": tmp_path / "out", "early_stop": 0, "best_of": 0, "export": "last", "max_steps": 1}
    options = options_in(folder, tmp_path / "again", **again, checkpoint=None, resume_ckpt=None)
    assert ranks(2).run(ended, options, console) == [(0, "")] * 2
    first = records(tmp_path / "again/log", "eval_loss")[0]
    assert first["step"] == 0
    assert first["eval_loss"] == pytest.approx(evaluations[best], rel=1e-6)


def test_asked_to_end_while_it_evaluates(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """The evaluation is given up, and made when the run goes on; records are those of a run that was not asked."""
    more = {"eval_data": (str(folder / "eval"),), "steps_per_eval": 2.0}
    whole, asked = (options_in(folder, tmp_path / name, **more) for name in ("whole", "asked"))
    (tmp_path / "whole").mkdir()
    assert ranks(2).run(ended, whole, tmp_path / "console") == [(0, "")] * 2
    assert ranks(2).run(asked_in_evaluation, asked, tmp_path / "console") == [75, 75]
    assert saved(tmp_path / "asked") == ["step-00000004"]
    assert json.loads((tmp_path / "asked/ckpt/step-00000004/index.json").read_text())["evaluation_pending"]
    assert ranks(2).run(ended, asked, tmp_path / "console") == [(0, "")] * 2
    assert losses(tmp_path / "asked") == losses(tmp_path / "whole")
    kept = [
        [(record["step"], record["eval_loss"]) for record in records(tmp_path / name / "log", "eval_loss")]
        for name in ("asked", "whole")
    ]
    assert kept[0] == kept[1]


def asked_in_evaluation(options: dict[str, Any], console: Path) -> int:
    """A run whose first process gets SIGTERM while the evaluation after step 4 begins."""
    from jllm.train import trainer

    evaluate = trainer.evaluate

    def signalled(*given: Any) -> Any:
        exchange = given[4]
        if exchange.__self__.step == 4 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return evaluate(*given)

    trainer.evaluate = signalled
    code, _ = ended(options, console)
    return code


def test_a_checkpoint_that_cannot_be_written(
    ranks: Callable[[int], Ranks], folder: Path, straight: list[tuple[int, float]], tmp_path: Path
) -> None:
    """It is tried once more at once; where that fails too, the run ends there and says what is on disk."""
    options = options_in(folder, tmp_path, steps_per_checkpoint=2, max_num_checkpoints=2)
    for failing, rank in (([4], 0), ([4], 1), ([4, 5], 1), ([4, 4, 5, 5], 0)):
        place = tmp_path / f"{len(failing)}-{rank}"
        given = {**options, "checkpoint": place / "ckpt", "log_dir": place / "log"}
        place.mkdir()
        answers = ranks(2).run(failing_writes, given, place / "console", failing, rank)
        console = (place / "console").read_text()
        assert "step-00000002 written after" in console
        assert "warning: checkpoint" in console
        assert "No space left on device" in console
        if len(failing) == 1:
            assert answers == [(0, "")] * 2
            assert losses(place) == straight
            assert saved(place) == ["step-00000006", "step-00000008"]
        else:
            assert [code for code, _ in answers] == [75, 75]
            assert answers[0][1] == answers[1][1]
            assert "the newest of 1 that are complete is" in answers[0][1]
            assert "step-00000002" in answers[0][1]
            assert saved(place) == ["step-00000002"]
        assert not list((place / "ckpt").glob(".step*"))
        assert ranks(2).run(ended, given, place / "console") == [(0, "")] * 2
        assert losses(place) == straight


def test_a_disk_that_stays_full_is_refused_at_the_start(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path
) -> None:
    for more in ({}, {"only_ckpt_model": True, "resume_ckpt": None}):
        place = tmp_path / str(len(more))
        place.mkdir()
        answers = ranks(2).run(on_a_full_disk, options_in(folder, place, **more), place / "console")
        assert [code for code, _ in answers] == [2, 2]
        assert answers[0] == answers[1]
        assert re.search(r"--checkpoint .*: a checkpoint needs about \d+ MiB of disk and 0 MiB are free", answers[0][1])


def on_a_full_disk(options: dict[str, Any], console: Path) -> tuple[int, str]:
    """A run whose disk has a thousand bytes left."""
    import shutil
    import types

    shutil.disk_usage = lambda path: types.SimpleNamespace(free=1000)  # type: ignore[assignment,return-value]
    return ended(options, console)


def failing_writes(options: dict[str, Any], console: Path, failing: list[int], rank: int) -> tuple[int, str]:
    """A run in which one process's disk is full when it writes after some steps, or the next after them."""
    import errno

    from jllm.train.checkpoint import saver

    write_file = saver.write_file
    left = len(failing)

    def full(file: Any, folder: Path, number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    begin = saver.Background.begin

    def begun(self: Any, job: Callable[[], None]) -> None:
        nonlocal left
        step = folder_step(job)
        fails = int(os.environ["RANK"]) == rank and step >= failing[0] and left > 0
        left -= fails
        saver.write_file = full if fails else write_file
        begin(self, job)

    saver.Background.begin = begun  # type: ignore[method-assign]
    return ended(options, console)


def folder_step(job: Callable[[], None]) -> int:
    """The step whose checkpoint a job writes."""
    cells = [cell.cell_contents for cell in job.__closure__ or ()]
    return next(int(each.name.removeprefix("step-")) for each in cells if isinstance(each, Path))


def test_a_second_interrupt_ends_at_once(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """Also where the main thread would not come to the end of the step for long."""
    group = Ranks(1)
    options = options_in(folder, tmp_path, pipe_parallel_size=1)
    group.start(ended, options, tmp_path / "console", {0: [signal.SIGINT, signal.SIGINT]})
    [process] = group._processes
    threading.Event().wait(0)
    process.join(60)
    assert process.exitcode == 130
    group.close()
