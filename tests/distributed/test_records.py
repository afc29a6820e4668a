"""What a real run leaves behind: learning rates, TensorBoard, its options, checkpoints by minutes, a bad step."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jllm.train.config import TrainConfig
from jllm.train.records.curves import plot
from jllm.train.records.sinks.flat import flat_numbers
from tests.distributed.ranks import Ranks
from tests.distributed.runs import fp16_works, logged_options, records, train_rank, train_rank_into
from tests.fixtures import random_rows, tiny_llama, write_rows
from tests.train.records.flags import parse
from tests.train.records.lines import ESTIMATE_LINE, EVALUATION_LINE, STEP_LINE, TIME


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    tiny_llama(folder / "model", tied=True)
    write_rows(folder / "data", random_rows(24), files=2)
    write_rows(folder / "eval", random_rows(7, seed=1))
    write_rows(folder / "masked", [{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 3)
    write_rows(folder / "short", [{"input_ids": [1]}] * 3)
    return folder


@pytest.mark.parametrize(
    ("more", "rate"),
    [
        (
            {"lr_scheduler_type": "cosine", "num_warmup_steps": 0.25, "lr_min": 1e-4},
            lambda n: n / 2 if n <= 2 else 0.1 + 0.9 * (1 + math.cos(math.pi * (n - 3) / 6)) / 2,
        ),
        (
            {"lr_scheduler_type": "linear", "num_warmup_steps": 4.0},
            lambda n: n / 4 if n <= 4 else 1 - (n - 5) / 4,
        ),
        ({"lr_scheduler_type": "constant"}, lambda n: 1.0),
    ],
)
def test_learning_rates(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path, more: dict[str, Any], rate: Callable[[int], float]
) -> None:
    """Those that the records say, and that plain SGD made its updates with."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from tests.distributed.reference import batches_in_order, targets_of

    more = {**more, "max_steps": 8, "optimizer": "sgd", "gradient_clipping": 0.0, "output_dir": tmp_path / "out"}
    assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **more)) == [None] * 2
    rates = [record["lr"] for record in records(tmp_path / "log")]
    assert rates == pytest.approx([1e-3 * rate(number) for number in range(1, 9)])
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters())
    for number, batch in enumerate(batches_in_order(folder / "data", steps=8, global_batch=4, seed=1234), start=1):
        optimizer.param_groups[0]["lr"] = 1e-3 * rate(number)
        optimizer.zero_grad()
        for row in batch:
            logits = model(input_ids=torch.tensor(row["input_ids"][:-1])[None]).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(targets_of(row)), reduction="sum")
            (loss / sum(len(each["input_ids"]) - 1 for each in batch)).backward()
        optimizer.step()
    wanted = model.state_dict()
    for path in (tmp_path / "out").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-5)


def scalars(log: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [(event.step, event.value) for event in EventAccumulator(str(log)).Reload().Scalars(tag)]


def test_tensorboard_has_every_step_once(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """After a resume that repeats steps too."""
    more = {"max_steps": 6, "steps_per_eval": 2.0, "eval_data": (f"held-out={folder / 'eval'}",)}
    more |= {"checkpoint": tmp_path / "ckpt", "steps_per_checkpoint": 4, "resume_ckpt": "auto"}
    for start in range(2):
        if start:
            shutil.rmtree(tmp_path / "ckpt/step-00000006")
        assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **more)) == [None] * 2
        log = tmp_path / "log"
        losses = [(record["step"], record["loss"]) for record in records(log)]
        evaluations = [(record["step"], record["eval_loss"]) for record in records(log, "eval_loss")]
        assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
        assert [step for step, _ in evaluations] == [0, 2, 4, 6]
        for tag, expected in (("train/loss", losses), ("eval/held-out/loss", evaluations)):
            found = scalars(log, tag)
            assert [step for step, _ in found] == [step for step, _ in expected]
            assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)
        assert [value for _, value in scalars(log, "train/lr")] == pytest.approx([r["lr"] for r in records(log)])


def test_events_tell_what_happened_and_every_number_is_on_the_board(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path
) -> None:
    """A run, a requeue that repeats two steps, and one that finds nothing left to do: one history, in order of time."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = {"max_steps": 6, "steps_per_eval": 3.0, "eval_data": (f"held-out={folder / 'eval'}",)}
    more |= {"checkpoint": tmp_path / "ckpt", "steps_per_checkpoint": 4, "resume_ckpt": "auto"}
    log = tmp_path / "log"
    for start in range(3):
        if start == 1:
            shutil.rmtree(tmp_path / "ckpt/step-00000006")
        assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **more)) == [None] * 2
    lines = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"]) for line in lines)
    events = [line for line in lines if "event" in line]
    written = ["checkpoint_started", "checkpoint_written"]
    history = ["start", *written, *written, "end", "start", "resume", *written, "end", "start", "resume", "end"]
    assert [event["event"] for event in events] == history
    assert len({event["run"] for event in events if event["event"] == "start"}) == 1
    assert [event["checkpoint"][-1] for event in events if event["event"] == "checkpoint_started"] == ["4", "6", "6"]
    ends = [event for event in events if event["event"] == "end"]
    assert [(end["reason"], end["exit_code"], end["is_saved"], end["step"]) for end in ends] == [
        ("complete", 0, True, 6)
    ] * 3
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    board = EventAccumulator(str(log)).Reload()
    for line in lines:
        if "event" not in line:
            for tag, value in flat_numbers(line).items():
                assert (line["step"], pytest.approx(value, rel=1e-6)) in [
                    (each.step, each.value) for each in board.Scalars(tag)
                ]


def test_quantiles_do_not_depend_on_how_rows_are_divided(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path
) -> None:
    """Histograms are added up over stages and pipelines; they are those of the losses of one plain model."""
    import torch
    from transformers import AutoModelForCausalLM

    from jllm.train.objectives.histogram import histogram, quantile
    from tests.distributed.reference import targets_of

    found = []
    for name, processes, stages in (("one", 1, 1), ("two", 2, 2), ("four", 4, 2)):
        more = {"eval_data": (str(folder / "eval"),), "max_steps": 1, "pipe_parallel_size": stages}
        options = logged_options(folder, tmp_path / name, **more)
        assert ranks(processes).run(train_rank, options) == [None] * processes
        record = records(tmp_path / name / "log", "eval_loss")[0]
        found.append({key: record[key] for key in record if "_p" in key or "accuracy" in key})
    # Another order of sums may move a token over the edge of a bin.
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=0.016)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    losses, entropies, top5 = [], [], 0
    for row in random_rows(7, seed=1):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(row["input_ids"][:-1])[None]).logits[0]
        targets = torch.tensor(targets_of(row))
        logits, targets = logits[targets >= 0], targets[targets >= 0]
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
        top5 += int((logits.topk(5).indices == targets[:, None]).sum())
    for name, each in (("loss", torch.cat(losses)), ("entropy", torch.cat(entropies))):
        counts = histogram(each, torch.ones_like(each).bool()).tolist()
        for percent in (10, 50, 90, 99):
            assert found[0][f"{name}_p{percent}"] == pytest.approx(quantile(counts, percent / 100), rel=0.016)
    assert found[0]["top5_accuracy"] == pytest.approx(top5 / len(torch.cat(losses)))


def train_rank_on_a_full_disk(options: dict[str, Any]) -> str | None:
    """A run whose records find the disk full from the second step on, until the fifth is being recorded."""
    from jllm.train.records import appended_file

    real, lines = os.write, [0]

    def write(descriptor: int, data: bytes) -> int:
        lines[0] += data.count(b'"loss": ')
        if 2 <= lines[0] < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    appended_file.os = types.SimpleNamespace(**{**vars(os), "write": write})  # type: ignore[assignment]
    return train_rank(options)


def test_a_disk_that_is_full_for_a_while_costs_no_record(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path
) -> None:
    options = logged_options(folder, tmp_path, max_steps=8)
    assert ranks(2).run(train_rank_on_a_full_disk, options) == [None] * 2
    lines = [json.loads(line) for line in (tmp_path / "log/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    warnings = [line["message"] for line in lines if line.get("event") == "warning"]
    assert len(warnings) <= 2  # of metrics.jsonl, and of TensorBoard's file
    assert "metrics.jsonl: No space left on device; what is recorded is kept" in warnings[0]
    assert [value for _, value in scalars(tmp_path / "log", "train/loss")] == pytest.approx(
        [line["loss"] for line in lines if "loss" in line]
    )


def test_the_recorded_options_make_the_same_run(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    more = {"max_steps": 6, "lr_scheduler_type": "polynomial", "num_warmup_steps": 0.3, "seed": 7}
    more |= {"eval_data": (str(folder / "eval"),), "checkpoint": tmp_path / "ckpt", "steps_per_checkpoint": 4}
    assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **more)) == [None] * 2
    recorded = tmp_path / "log/config.toml"
    first = recorded.read_text()
    others = ["--log_dir", str(tmp_path / "again"), "--checkpoint", str(tmp_path / "other")]
    again = parse("--config", str(recorded), *others)
    fields = {field.name: getattr(again, field.name) for field in dataclasses.fields(TrainConfig)}
    assert ranks(2).run(train_rank, fields) == [None] * 2
    for key in ("loss", "eval_loss"):
        runs = [[record[key] for record in records(tmp_path / name, key)] for name in ("log", "again")]
        assert runs[0] == runs[1]
    shutil.rmtree(tmp_path / "ckpt/step-00000006")
    more |= {"resume_ckpt": "auto", "steps_per_print": 3}
    assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **more)) == [None] * 2
    assert recorded.read_text() == first
    assert "steps_per_print = 3\n" in (tmp_path / "log/config-from-step-00000005.toml").read_text()


def test_the_console_has_a_line_of_the_form_for_each_record(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path
) -> None:
    more = {"max_steps": 8, "steps_per_eval": 4.0, "eval_data": (str(folder / "eval"),), "skip_train_steps": "3"}
    assert ranks(2).run(train_rank_into, logged_options(folder, tmp_path, **more), tmp_path / "console") == [None] * 2
    lines = (tmp_path / "console").read_text().splitlines()
    for form, start, count in (
        (STEP_LINE, "step ", 8),
        (EVALUATION_LINE, "evaluation ", 3),
        (ESTIMATE_LINE, "about ", 1),
    ):
        found = [line for line in lines if re.match(rf"{TIME}{start}(?:\d|on )", line)]
        assert len(found) == count
        assert all(form.fullmatch(line) for line in found), found


def train_rank_20_s_a_step(options: dict[str, Any]) -> str | None:
    """A run whose steps take 20 s by the clock that checkpoints go by."""
    from jllm.train.distributed.deepspeed_engine import TrainingEngine
    from jllm.train.lifecycle import requests

    passed = [0.0]
    train_step = TrainingEngine.train_step

    def slow(*arguments: Any) -> float:
        passed[0] += 20
        return train_step(*arguments)

    TrainingEngine.train_step = slow  # type: ignore[method-assign]
    requests.time = types.SimpleNamespace(**{**vars(time), "monotonic": lambda: passed[0]})  # type: ignore[attr-defined]
    return train_rank(options)


def test_checkpoints_by_minutes(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """A minute has passed after three steps; the step being made then is the last one before the checkpoint."""
    more = {"max_steps": 10, "checkpoint": tmp_path / "ckpt", "steps_per_checkpoint": 9, "clean": True}
    for minutes, expected in ((0.0, [9, 10]), (1.0, [4, 8, 9, 10]), (60.0, [9, 10])):
        shutil.rmtree(tmp_path / "ckpt", ignore_errors=True)
        options = logged_options(folder, tmp_path, **more, minutes_per_checkpoint=minutes)
        assert ranks(2).run(train_rank_20_s_a_step, options) == [None] * 2
        found = sorted(path.name for path in (tmp_path / "ckpt").glob("step-*"))
        assert found == [f"step-{step:08d}" for step in expected], minutes


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_step_that_is_not_finite_is_recorded(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path, policy: str
) -> None:
    """Also the one that ends the run: the records and the plot go up to it."""
    more = {"max_steps": 4, "learning_rate": 1e30, "gradient_clipping": 0.0, "on_nan": policy, "optimizer": "sgd"}
    answers = ranks(2).run(train_rank, logged_options(folder, tmp_path, **more))
    lines = [json.loads(line) for line in (tmp_path / "log/metrics.jsonl").read_text().splitlines()]
    lines, events = [line for line in lines if "event" not in line], [line for line in lines if "event" in line]
    bad = next(line for line in lines if isinstance(line["loss"], str) or isinstance(line["grad_norm"], str))
    assert {bad["loss"], bad["grad_norm"]} & {"nan", "inf"}
    assert bad["step"] == 2
    if policy == "stop":
        assert all(answer is not None and answer.startswith("step 2: loss") for answer in answers)
        assert lines[-1] == bad
        assert (events[-1]["event"], events[-1]["reason"]) == ("end", "error")
        assert events[-1]["message"] == answers[0]
    else:
        assert answers == [None] * 2
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert [each["step"] for each in events if each["event"] == "bad_step"] == [2, 3, 4]
    assert plot([tmp_path / "log"]).is_file()


@pytest.mark.parametrize("name", ["masked", "short"])
def test_an_evaluation_set_without_targets_is_refused(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path, name: str
) -> None:
    more = {"eval_data": (str(folder / "eval"), f"m={folder / name}"), "max_steps": 1}
    for answer in ranks(2).run(train_rank, logged_options(folder, tmp_path, **more)):
        assert answer is not None
        assert answer.startswith(f"--eval_data m: no token of {folder / name} is a target")
    assert not (tmp_path / "log/metrics.jsonl").exists()


def test_fp16_without_a_device_for_it_is_a_mistake(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """Before any data is opened."""
    if any(ranks(2).run(fp16_works)):
        pytest.skip("this processor works with fp16")
    options = logged_options(folder, tmp_path, train_data=("nowhere",), precision="fp16", max_steps=1)
    for answer in ranks(2).run(train_rank, options):
        assert answer == "--precision fp16: the device of this run (cpu) does not work with it; give bf16 or fp32"
