"""A service gets everything in order, holds nobody up, and may go away and come back."""

import threading
import time
from pathlib import Path

import pytest

from jllm.train.records.sinks import reporter
from jllm.train.records.sinks.reporter import Reporter


class Memory:
    """A service that remembers, and is away when told."""

    name = "memory"

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.is_away = False
        self.here = threading.Event()
        self.here.set()

    def _called(self, *call: object) -> None:
        self.here.wait()
        if self.is_away:
            raise ConnectionError("no route\nto host")
        self.calls.append(call)

    def begin(self) -> None:
        self._called("begin")

    def numbers(self, numbers: dict[str, float], step: int) -> None:
        self._called("numbers", numbers, step)

    def artefact(self, kind: str, folder: Path, step: int) -> None:
        self._called("artefact", kind, folder, step)

    def end(self) -> None:
        self._called("end")


def test_an_outage_loses_nothing_and_is_said_once() -> None:
    service = Memory()
    reports = Reporter(service, pause=0.001)
    problems: list[str] = []
    for step in range(1, 41):
        service.is_away = 10 <= step < 20 or 30 <= step < 35
        reports.numbers({"step": step, "loss": 1 / step})
        time.sleep(0.002)
        problems += reports.take_problems()
    reports.artefact("model", Path("out"), step=40)
    reports.finish()
    reports.wait(60)
    [problem] = problems + reports.take_problems()
    assert problem.startswith("--report_to memory: ConnectionError: no route to host; it is tried again")
    steps = [("numbers", {"train/loss": 1 / step}, step) for step in range(1, 41)]
    assert service.calls == [("begin",), *steps, ("artefact", "model", Path("out"), 40), ("end",)]


def test_a_service_that_hangs_is_left_alone() -> None:
    service = Memory()
    service.here.clear()
    reports = Reporter(service)
    for step in range(100):
        reports.numbers({"step": step, "loss": 1.0})
    reports.finish()
    reports.wait(0.05)
    assert service.calls == []
    assert reports.take_problems() == ["--report_to memory: 101 records did not get there in time"]
    service.here.set()


def test_the_oldest_records_go_when_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "MOST_WAITING", 10)
    service = Memory()
    service.here.clear()
    reports = Reporter(service)
    for step in range(100):
        reports.numbers({"step": step, "loss": 1.0})
    service.here.set()
    reports.finish()
    reports.wait(60)
    assert [call[0] for call in service.calls] == ["begin", *["numbers"] * 8, "end"]
    assert [call[2] for call in service.calls[1:-1]] == list(range(92, 100))
