"""What follows an update hangs on the optimizer's own step, with the rates of its groups."""

from pathlib import Path

import pytest
import torch

from jllm.errors import UserError
from jllm.models.adapters.control import ControlAdapters, attach_control
from jllm.parallel.mesh import Mesh
from jllm.train.optim.after_step import ControlAfterStep, Report, Spread, record_of_adapters
from tests.fixtures import tiny_llama
from tests.models.chain import load_chain


class Told:
    """Processes that have said what they have."""

    def __init__(self, *reports: Report) -> None:
        self.reports, self.mesh = reports, Mesh(pipe=2, data=len(reports) // 2)

    def gather(self, report: Report) -> list[Report]:
        assert report is self.reports[0]
        return list(self.reports)

    def report(self) -> Report:
        return self.reports[0]


def report(*values: float, broken: str | None = None) -> Report:
    spread = Spread(count=len(values), total=sum(values), least=min(values), most=max(values)) if values else None
    return Report(spreads={"lora_norm": spread} if spread is not None else {}, broken=broken)


def test_records_are_of_all_stages_once() -> None:
    """Of two pipelines one speaks; a stage without adapters says nothing."""
    told = Told(report(1.0, 2.0), report(6.0), report(1.0, 2.0), report(6.0))
    found = record_of_adapters(told, told, step=3)  # type: ignore[arg-type]
    assert found == {"lora_norm_avg": 3.0, "lora_norm_min": 1.0, "lora_norm_max": 6.0}
    told = Told(report(4.0), report())
    assert record_of_adapters(told, told, step=3)["lora_norm_avg"] == 4.0  # type: ignore[arg-type]
    assert record_of_adapters(None, told, step=3) == {}  # type: ignore[arg-type]


def test_what_is_not_finite_is_named() -> None:
    told = Told(report(1.0), report(float("nan"), broken="model.layers.3"))
    with pytest.raises(UserError, match=r"^after step 3 the adapter of model.layers.3 has values that are not finite"):
        record_of_adapters(told, told, step=3)  # type: ignore[arg-type]


def test_it_follows_steps_with_the_rate_of_each_group(tmp_path: Path) -> None:
    tiny_llama(tmp_path, tied=True)
    [stage] = load_chain(tmp_path, [0, 4])
    options = {"prefix": "model.layers", "layers": {1, 2}, "width": 32, "seed": 1}
    attach_control(stage.model, rank=3, dtype=torch.float32, **options)  # type: ignore[arg-type]
    strengths = [value for name, value in stage.model.named_parameters() if name.endswith("control_S")]
    for value in strengths:
        torch.nn.init.ones_(value)
    rest = [value for value in stage.model.parameters() if value.requires_grad and value.ndim > 1]
    optimizer = torch.optim.SGD([{"params": strengths, "lr": 0.1}, {"params": rest, "lr": 1.0}])
    follower = ControlAfterStep(ControlAdapters(stage.model), optimizer, gamma=0.5, decay=2.0)
    assert follower.report().spreads.keys() == {"control_lambda", "control_skew"}
    optimizer.step()
    for value in strengths:
        torch.testing.assert_close(value.detach(), torch.full((3,), 0.8))
    spreads = follower.report().spreads
    lost = float(torch.expm1(torch.tensor(1.0)) - torch.expm1(torch.tensor(0.8)))
    assert spreads["control_decay"].total == pytest.approx(2 * lost, rel=1e-5)
    assert "control_decay" not in follower.report().spreads
