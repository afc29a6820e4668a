"""Optimizers, and what each of them keeps for a parameter.

A checkpoint holds what the table `KINDS` names, so that a run goes on bit by bit, on other layouts too: tensors of the
parameter's shape in pieces, tensors of a shape of their own and numbers whole.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from jllm.models.pipeline.carving import published_names, structure_of
from jllm.models.pipeline.stage import PipelineStage
from jllm.models.trainable import check_matches, matches, patterns_of
from jllm.train.config import TrainConfig
from jllm.train.optim.muon import TypedMuon
from jllm.train.optim.schedules import RATE_FACTOR
from jllm.train.options.optimizer import module_rates

NAMES = "names"
"""In a parameter group: the whole model's names of its parameters, in order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerKind:
    """What an optimizer keeps for each parameter.

    Attributes:
        shaped: tensors of the parameter's shape, an element for each of its.
        other: tensors of other shapes, of whole parameters.
        numbers: of a parameter or of its group.
        moments: how many numbers of the trained type that makes, for each of the parameter's.
    """

    shaped: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    moments: float = 0


KINDS: Mapping[str, OptimizerKind] = {
    "adamw": OptimizerKind(shaped=("exp_avg", "exp_avg_sq"), moments=2),
    "sgd": OptimizerKind(),
    "adamw_kahan": OptimizerKind(shaped=("exp_avg", "exp_avg_sq", "kahan_comp"), numbers=("step",), moments=3),
    "adamw_8bit": OptimizerKind(
        shaped=("state1", "state2"), other=("absmax1", "absmax2"), numbers=("step",), moments=1
    ),
    "schedule_free": OptimizerKind(shaped=("z", "exp_avg_sq"), numbers=("k", "weight_sum", "lr_max"), moments=2),
    "muon": OptimizerKind(shaped=("momentum_buffer", "exp_avg", "exp_avg_sq"), numbers=("step",), moments=1),
}
"""By the name that `--optimizer` has for it. AdamW's number of steps is that of the run."""


class MuonWithAdamW(Optimizer):
    """Muon for the matrices inside the model, AdamW for embedding, head and vectors, which Muon is not meant for."""

    def __init__(self, groups: list[dict[str, Any]], config: TrainConfig) -> None:
        super().__init__(groups, {"lr": config.learning_rate})
        self._parts: list[Optimizer] = []
        if matrices := [group for group in groups if group["is_matrix"]]:
            self._parts.append(TypedMuon(matrices, lr=config.learning_rate))
        if others := [group for group in groups if not group["is_matrix"]]:
            self._parts.append(_adamw(others, config))
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        for part in self._parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of both parts."""
        assert closure is None
        for part in self._parts:
            part.step()


def build_optimizer(stage: PipelineStage, config: TrainConfig, *, attached: Collection[str] = ()) -> Optimizer:
    """The optimizer of `--optimizer` over the trainable parameters; matrices alone (two or more axes) are decayed.

    With `--loraplus_lr_ratio` the second matrices of adapters, and vectors, have rates of their own, as in peft; with
    `--module_learning_rate` the modules that it names. `attached` are the names of what is attached on all stages.

    Raises:
        UserError: a pattern matches nothing.
    """
    groups = parameter_groups(stage, config, attached)
    rate, betas = config.learning_rate, (config.adam_beta1, config.adam_beta2)
    is_cuda = groups[0]["params"][0].is_cuda
    kind = config.optimizer
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=rate)
    if kind == "muon":
        return MuonWithAdamW(groups, config)
    # Imported where they are used: `jllm.train.checks.packages` has seen to it that they are there.
    if kind == "adamw_kahan":
        from optimi import AdamW as KahanAdamW

        return KahanAdamW(groups, lr=rate, betas=betas, eps=config.adam_eps, triton=is_cuda, foreach=not is_cuda)  # type: ignore[no-any-return]
    if kind == "adamw_8bit":
        from bitsandbytes.optim.adamw import AdamW8bit

        return AdamW8bit(groups, lr=rate, betas=betas, eps=config.adam_eps)  # type: ignore[no-any-return]
    if kind == "schedule_free":
        from schedulefree import AdamWScheduleFree

        optimizer: Optimizer = AdamWScheduleFree(groups, lr=rate, betas=betas, eps=config.adam_eps)
        optimizer.train()  # type: ignore[attr-defined]
        return optimizer
    return _adamw(groups, config)


def _adamw(groups: list[dict[str, Any]], config: TrainConfig) -> AdamW:
    return AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        # One kernel instead of a dozen, and no temporary tensors of the optimizer's size.
        fused=groups[0]["params"][0].is_cuda or config.offload_optimizer,
    )


def parameter_groups(stage: PipelineStage, config: TrainConfig, attached: Collection[str]) -> list[dict[str, Any]]:
    """The trainable parameters, those that are treated alike in one group; matrices first.

    `attached` are the names of what is attached on all stages.

    Raises:
        UserError: a pattern of `--module_learning_rate` matches nothing.
    """
    names = published_names(stage.model, stage.span)
    inside = {id(parameter) for parameter in stage.model.parameters()}
    own = {id(parameter): names[name] for name, parameter in stage.model.named_parameters()}
    ends = _ends(stage)
    rates = [
        (
            patterns_of("--module_learning_rate", pattern)[0],
            rate / config.learning_rate if config.learning_rate else 0.0,
        )
        for pattern, rate in module_rates(config)
    ]
    for pattern, _ in rates:
        check_matches("--module_learning_rate", pattern, [*structure_of(stage.model).parameters, *attached])
    groups: list[dict[str, Any]] = []
    for parameter in stage.parameters():
        if not parameter.requires_grad:
            continue
        name = own[id(parameter)] if id(parameter) in inside else ""
        factor = config.loraplus_lr_ratio if "lora_B" in name or parameter.ndim == 1 else 1.0
        factor = next((other for pattern, other in rates if matches(pattern, name)), factor)
        kind: dict[str, Any] = {
            "weight_decay": config.weight_decay if parameter.ndim >= 2 else 0.0,
            RATE_FACTOR: factor,
        }
        if config.optimizer == "muon":
            kind["is_matrix"] = parameter.ndim == 2 and id(parameter) not in ends
        known = next((group for group in groups if kind.items() <= group.items()), None)
        if known is None:
            known = {"params": [], NAMES: [], **kind, "lr": config.learning_rate * factor}
            groups.append(known)
        known["params"].append(parameter)
        known[NAMES].append(name)
    return sorted(groups, key=lambda group: bool(group["params"][0].ndim < 2))


def _ends(stage: PipelineStage) -> set[int]:
    """The parameters before the first and after the last decoder layer, adapters apart."""
    structure = structure_of(stage.model)
    modules = [stage.model.get_submodule(name) for name in (*structure.before, *structure.after)]
    modules += [each for each in (stage.model.get_input_embeddings(), stage.model.get_output_embeddings()) if each]
    return {id(parameter) for module in modules for name, parameter in module.named_parameters() if "lora_" not in name}


def make_state(optimizer: Optimizer, name: str) -> None:
    """Give every parameter the state that its first update would make, for a checkpoint to be read into.

    Args:
        optimizer: as `build_optimizer` made it.
        name: its name.
    """
    for index, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            state = optimizer.state[parameter]
            if name == "adamw_8bit":
                optimizer.init_state(group, parameter, index, place)  # type: ignore[attr-defined]
            elif name == "schedule_free":
                state |= {"z": parameter.detach().clone(), "exp_avg_sq": torch.zeros_like(parameter)}
            elif name == "muon" and group["is_matrix"]:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            elif name == "adamw_kahan":
                is_low = parameter.dtype in (torch.bfloat16, torch.float16)
                state |= {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
                state["kahan_comp"] = torch.zeros_like(parameter) if is_low else None
                group |= {"setup": True, "step": torch.tensor(0, dtype=torch.int32)}
                if is_low:
                    group["kahan_sum"] = True
            elif name in ("adamw", "muon"):
                device = parameter.device if group.get("fused") else "cpu"  # as torch itself makes it
                state["step"] = torch.tensor(0.0, dtype=torch.float32, device=device)
                state |= {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}


def number_of(optimizer: Optimizer, parameter: nn.Parameter | None, group: dict[str, Any], kind: str) -> float | None:
    """A number that the optimizer keeps for a parameter, or for its group; None before the first update."""
    state = optimizer.state.get(parameter, {}) if parameter is not None else {}
    value = state.get(kind, group.get(kind))
    return None if value is None else float(value)


def set_number(
    optimizer: Optimizer, parameter: nn.Parameter | None, group: dict[str, Any], kind: str, value: float
) -> None:
    """The inverse of `number_of`."""
    state = optimizer.state.get(parameter, {}) if parameter is not None else {}
    holder: dict[str, Any] = state if kind in state else group
    known = holder.get(kind)
    if torch.is_tensor(known):
        known.fill_(value)
    else:
        holder[kind] = int(value) if isinstance(known, int) else value
