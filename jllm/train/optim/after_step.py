"""What happens to adapters after an update of the optimizer, and what records say of them.

It hangs on the optimizer's own step, so a step that is not made, because a gradient is not finite, changes nothing here
either. Learning rates are those of the update, with the factors of parameter groups.

Guarantees: processes that hold the same adapters change them alike. Costs: that of `jllm.models.adapters`, and once a
step a number for each adapter from every process.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from jllm.errors import UserError
from jllm.models.adapters.control import ControlAdapters
from jllm.train.config import TrainConfig
from jllm.train.distributed.agreement import Agreement

if TYPE_CHECKING:  # peft is not there in every installation
    from jllm.models.adapters.lora_products import LoraProducts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Numbers of several adapters."""

    count: int
    total: float
    least: float
    most: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What one process says of its adapters.

    Attributes:
        spreads: by what is told.
        broken: an adapter with values that are not finite; None where all are.
    """

    spreads: Mapping[str, Spread]
    broken: str | None


class AfterStep(Protocol):
    """What follows updates."""

    def report(self) -> Report:
        """How the adapters of this stage are, and what has been done to them since the last report. Waits for the
        device."""


class _Decay:
    """The decay of adapters, with the rates of an optimizer's groups, and what it took of their sizes."""

    def __init__(
        self,
        weight: float,
        adapters: "LoraProducts | ControlAdapters",
        sizes: Callable[[], Tensor],
        optimizer: Optimizer,
    ) -> None:
        self._weight, self._adapters, self._sizes = weight, adapters, sizes
        self._groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        self._lost: Sequence[float] | None = None

    def apply(self) -> None:
        if self._weight:
            before = self._sizes()
            self._adapters.decay(self._weight, lambda parameter: float(self._groups[id(parameter)]["lr"]))
            self._lost = (before - self._sizes()).tolist()

    def take_lost(self) -> Sequence[float] | None:
        """What the last update lost; None where there was none since the last question."""
        lost, self._lost = self._lost, None
        return lost


class LoraAfterStep:
    """Decay and limit of the products BA.

    Args:
        products: of the stage.
        optimizer: its updates come first.
        decay: `--lora_weight_decay`.
        limit: `--lora_max_norm`.
    """

    def __init__(self, products: "LoraProducts", optimizer: Optimizer, *, decay: float, limit: float | None) -> None:
        self._products, self._limit = products, limit
        self._decay = _Decay(decay, products, products.norms, optimizer)
        if decay or limit is not None:
            optimizer.register_step_post_hook(lambda *_: self._change())

    def _change(self) -> None:
        self._decay.apply()
        if self._limit is not None:
            self._products.limit(self._limit)

    def report(self) -> Report:
        told = {"lora_norm": self._products.norms().tolist(), "lora_decay": self._decay.take_lost()}
        return _report(self._products.names, told)


class ControlAfterStep:
    """Control adapters: their directions made orthogonal again, their strengths decayed.

    Args:
        adapters: of the stage.
        optimizer: its updates come first.
        gamma: `--control_adapter_gamma`.
        decay: `--control_weight_decay`.
    """

    def __init__(self, adapters: ControlAdapters, optimizer: Optimizer, *, gamma: float, decay: float) -> None:
        self._adapters, self._gamma = adapters, gamma
        self._decay = _Decay(decay, adapters, adapters.strengths, optimizer)
        optimizer.register_step_post_hook(lambda *_: self._change())

    def _change(self) -> None:
        self._adapters.straighten(self._gamma)
        self._decay.apply()

    def report(self) -> Report:
        told = {
            "control_lambda": self._adapters.strengths().tolist(),
            "control_skew": self._adapters.skews().tolist(),
            "control_decay": self._decay.take_lost(),
        }
        return _report(self._adapters.names, told)


def follow_updates(config: TrainConfig, model: nn.Module, optimizer: Optimizer) -> AfterStep | None:
    """Let the optimizer's updates be followed by what the options ask for; None where there are no adapters."""
    if config.has_control:
        return ControlAfterStep(
            ControlAdapters(model),
            optimizer,
            gamma=config.control_adapter_gamma,
            decay=config.control_weight_decay,
        )
    if not config.has_lora:
        return None
    from jllm.models.adapters.lora_products import LoraProducts

    products = LoraProducts(model)
    return LoraAfterStep(products, optimizer, decay=config.lora_weight_decay, limit=config.lora_max_norm)


def record_of_adapters(after_step: AfterStep | None, agreement: Agreement, *, step: int) -> dict[str, float]:
    """Mean, least and most over the adapters of all stages, as records have them; all processes call it together.

    Args:
        after_step: of this process; None on all where there are no adapters.
        agreement: the processes.
        step: the number of the step, for a message.

    Raises:
        UserError: on every process: an adapter has values that are not finite.
    """
    if after_step is None:
        return {}
    reports = agreement.gather(after_step.report())
    stages = [reports[rank] for rank in agreement.mesh.writers]
    broken = next((each.broken for each in stages if each.broken is not None), None)
    if broken is not None:
        raise UserError(
            f"after step {step} the adapter of {broken} has values that are not finite; lower --learning_rate and the"
            " decay, and go on from the newest checkpoint"
        )
    found: dict[str, float] = {}
    for kind in dict.fromkeys(kind for each in stages for kind in each.spreads):
        spreads = [each.spreads[kind] for each in stages if kind in each.spreads]
        found |= {
            f"{kind}_avg": sum(each.total for each in spreads) / sum(each.count for each in spreads),
            f"{kind}_min": min(each.least for each in spreads),
            f"{kind}_max": max(each.most for each in spreads),
        }
    return found


def _report(names: Sequence[str], told: Mapping[str, Sequence[float] | None]) -> Report:
    """Values of the adapters of these names, by what is told; None where nothing is."""
    spreads = {
        kind: Spread(count=len(values), total=sum(values), least=min(values), most=max(values))
        for kind, values in told.items()
        if values
    }
    lost = (name for values in told.values() for name, value in zip(names, values or (), strict=False)
            if not math.isfinite(value))  # fmt: skip
    return Report(spreads=spreads, broken=next(lost, None))
