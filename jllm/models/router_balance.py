"""Mixture of experts: the loss that keeps experts evenly loaded, and how evenly they are loaded.

The balance loss of one layer is that of the Switch Transformer paper, `experts · Σ_e share of tokens(e) · mean
probability(e)`; the model's is the mean over its routed layers. transformers multiplies sums over all layers instead,
which no single stage can compute; the two are equal for a model of one routed layer. The shares are of the experts
that the router chose, where it says so (a bias or groups may decide), else of those with the largest logits.

Each router's layer adds its own part of the gradient where its output is used, so stages need not talk to each other:
the loss never travels, and the value is only for the log. Works under activation checkpointing. Padding at the end of
rows is routed as tokens are, and counts like them. Where ranks share the tokens of rows, shares and probabilities are
those of whole rows: each rank has the whole loss, and the gradient of its own tokens.

Costs: a softmax, a histogram and a sum per routed layer; no wait for the device until `take` is called; where ranks
share rows, two numbers for each expert that are summed over them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from jllm.errors import UserError
from jllm.models.pipeline.carving import structure_of
from jllm.models.pipeline.span import StageSpan
from jllm.models.pipeline.structure import find_routers
from jllm.models.pipeline.trial import is_trial
from jllm.parallel.mesh import Mesh
from jllm.parallel.sequence.group import SequenceGroup


@dataclass(frozen=True, kw_only=True)
class RouterReport:
    """What the routers of one stage did since the last report."""

    loss: float
    """This stage's part of the model's balance loss, mean over micro-batches. The parts of all stages add up."""
    load: dict[str, list[float]]
    """Router name → share of the assignments that each expert received; each list sums to 1."""


class RouterBalance:
    """Watches the routers of a stage in training mode, adds the balance loss's gradient, and keeps count of loads.

    `scale` is what the gradient of the training loss is multiplied with before it reaches this stage's parameters:
    1 / gradient accumulation steps under DeepSpeed, times the loss scale in fp16. That one changes between steps: the
    owner sets `scale` anew before each. `group` are the ranks that share the tokens of rows; None where rows are whole.
    """

    def __init__(
        self, model: PreTrainedModel, coefficient: float, *, scale: float = 1.0, group: SequenceGroup | None = None
    ) -> None:
        self.coefficient = coefficient
        self.scale = scale
        self._group = group
        self._routed_layers = len(structure_of(model).routers)
        self._chosen = experts_per_token(model.config)
        self._loss: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}
        for name, index in find_routers(model).items():
            self._watch(name, model.get_submodule(name), index)

    def _watch(self, name: str, router: nn.Module, index: int) -> None:
        def observe(module: nn.Module, inputs: Any, output: Any) -> Any:
            if not module.training or is_trial():  # an evaluation between two steps is not part of either
                return None
            logits = output[index] if isinstance(output, tuple) else output
            picked = _chosen_experts(output, logits, self._chosen)
            loss, counts = balance_loss(logits, self._chosen, picked, self._group)
            self._note(name, loss.detach(), counts)
            if not (self.coefficient and torch.is_grad_enabled() and loss.requires_grad):
                return None
            # The engine averages over the ranks that share rows, and their parts of the gradient are to be added up.
            scale = self.scale if self._group is None else self.scale * self._group.size
            part = loss * (self.coefficient * scale / self._routed_layers)
            if not isinstance(output, tuple):
                return _AddGradient.apply(output, part)
            # The experts use the scores rather than the logits where the router returns both.
            used = [i for i, value in enumerate(output) if i != index and _is_trained(value)]
            carrier = used[0] if used else index
            return (*output[:carrier], _AddGradient.apply(output[carrier], part), *output[carrier + 1 :])

        # Compiled layers share one graph, in which the first router's hook would stand for all: it stays outside.
        router.register_forward_hook(torch.compiler.disable(observe))

    def _note(self, name: str, loss: Tensor, counts: Tensor) -> None:
        known = name in self._calls
        self._loss[name] = self._loss[name] + loss if known else loss
        self._counts[name] = self._counts[name] + counts if known else counts
        self._calls[name] = self._calls.get(name, 0) + 1

    def take(self) -> RouterReport:
        """The report since the last one, and start anew. Waits for the device."""
        loss = sum(float(self._loss[name]) / calls for name, calls in self._calls.items())
        load = {name: (counts / counts.sum().clamp(min=1)).tolist() for name, counts in self._counts.items()}
        self._loss, self._counts, self._calls = {}, {}, {}
        return RouterReport(loss=loss / max(self._routed_layers, 1), load=load)


def attach_router_balance(
    model: PreTrainedModel, span: StageSpan, coefficient: float, *, group: SequenceGroup | None = None
) -> RouterBalance:
    """Watch this stage's routers; a coefficient of 0 only watches. A stage without routers reports nothing.

    `group` as for `RouterBalance`.

    Raises:
        UserError: on every stage alike, for a model without routers that transformers records.
    """
    if not structure_of(model).routers:
        raise UserError(
            f"--router_aux_loss_coef {coefficient}: model type {model.config.model_type!r} has no routers that "
            "transformers records; leave the option out"
        )
    return RouterBalance(model, coefficient, group=group)


def experts_per_token(config: PretrainedConfig) -> int:
    """How many experts a token is sent to.

    Raises:
        UserError: the configuration does not say.
    """
    text = config.get_text_config(decoder=True)
    for name in ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "num_experts_per_token", "moe_top_k"):
        if isinstance(value := getattr(text, name, None), int):
            return value
    raise UserError(f"model type {config.model_type!r} does not say how many experts a token goes to")


def balance_loss(
    logits: Tensor, chosen: int, picked: Tensor | None = None, group: SequenceGroup | None = None
) -> tuple[Tensor, Tensor]:
    """(loss of one layer, tokens per expert [experts]) from router logits [..., experts].

    `picked` [tokens, chosen] are the experts that the router chose; without it they are those of the largest logits.
    With a `group`, both are of its ranks' tokens together; the gradient is that of the own ones.
    """
    logits = logits.flatten(0, -2).float()
    tokens, experts = logits.shape
    probabilities = logits.softmax(-1)
    if picked is None:
        picked = probabilities.topk(chosen, dim=-1).indices
    counts = torch.zeros(experts, device=logits.device).scatter_add_(
        0, picked.flatten(), torch.ones(picked.numel(), device=logits.device)
    )
    sums = probabilities.sum(0)
    if group is not None:
        # Of the others' tokens only the numbers are here: the gradient goes to the own ones.
        everyone = group.total(torch.cat([counts, sums.detach(), counts.new_tensor([tokens])]))
        counts, sums = everyone[:experts], sums + (everyone[experts:-1] - sums.detach())
        return experts * (counts * sums).sum() / everyone[-1].square(), counts
    return experts * (counts / tokens * probabilities.mean(0)).sum(), counts


def _chosen_experts(output: Any, logits: Tensor, chosen: int) -> Tensor | None:
    """The experts [tokens, chosen] that a router says it chose: by a bias, within groups, or by a table."""
    size = logits.numel() // logits.shape[-1] * chosen
    for value in output if isinstance(output, tuple) else ():
        if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
            continue
        if value.ndim > 1 and value.shape[-1] == chosen and value.numel() == size:
            return value.long()
    return None


def _is_trained(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad


class _AddGradient(torch.autograd.Function):
    """Returns its first input; in the backward pass the second one is a loss."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_dtype = loss.dtype
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones((), dtype=ctx.loss_dtype, device=gradients[0].device)


def summary(reports: Sequence[RouterReport], mesh: Mesh) -> dict[str, float | None]:
    """Balance loss and expert loads over all stages and pipelines, as records have them.

    Args:
        reports: of each process, by rank.
        mesh: of the run.
    """
    load: dict[str, list[float]] = {}
    for rank in mesh.writers:
        load |= reports[rank].load
    return {
        # The slices of a stage have the same routers, and ranks that share rows the same loss.
        "aux_loss": sum(report.loss for report in reports) / (mesh.copies * mesh.tensor),
        "max_expert_load": max(max(shares) for shares in load.values()) if load else None,
    }
