"""Weights, master weights and optimizer state by parameter name, whatever DeepSpeed's optimizer makes of them.

With ZeRO stage 1 each data-parallel rank owns a run of one long flat fp32 tensor; DeepSpeed records on every
parameter which part of it this rank holds. Without, every rank holds everything, and the ranks of a stage divide the
parameters among themselves for saving. Either way a `Piece` says which region of which parameter is here.

Cost: views only; nothing is copied.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from jllm.models.pipeline.stage import PipelineStage
from jllm.parallel.tensor.slices import whole_shape
from jllm.train.checkpoint.format import MASTER, WEIGHT, Piece
from jllm.train.checkpoint.held import parts_of, read_parts
from jllm.train.checkpoint.reader import CheckpointReader
from jllm.train.checkpoint.regions import Region
from jllm.train.distributed.deepspeed_engine import TrainingEngine
from jllm.train.optim.averaged import averaged
from jllm.train.optim.optimizers import KINDS, NAMES, make_state, number_of, set_number

STEP = "step"


class TrainingState:
    """The state of this process's stage, as pieces with names that do not depend on the number of stages.

    Args:
        engine: with the optimizer.
        stage: of this process.
        optimizer: the name of the optimizer.
    """

    def __init__(self, engine: TrainingEngine, stage: PipelineStage, optimizer: str) -> None:
        self._engine = engine
        self._parameters = stage.stored_parameters()
        self._name, self._kind = optimizer, KINDS[optimizer]
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        assert isinstance(inner, torch.optim.Optimizer)
        self._inner = inner
        self._updates = 0
        self._groups = {name: group for group in inner.param_groups for name in group[NAMES]}
        inner.register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._updates += 1

    def _is_copied(self, parameter: nn.Parameter) -> bool:
        """From the first stage, or from another slice of this one."""
        return bool(getattr(parameter, "ds_pipe_replicated", False))

    def pieces(self, *, alone: bool = False) -> list[Piece]:
        """What this process has to save: its share of its stage, or, `alone`, all that it needs to go on by itself."""
        found = []
        for number, (name, parameter) in enumerate(self._parameters.items()):
            if self._is_copied(parameter) and not alone:
                continue
            mine = alone or self._engine.place.owns(number)
            if mine:
                found += _pieces(WEIGHT, name, parameter, 0, parameter.detach().reshape(-1))
            if not parameter.requires_grad:
                continue
            for kind, start, tensor in self._high_precision(parameter, mine=mine):
                found += _pieces(kind, name, parameter, start, tensor.detach())
            if mine:
                found += self._whole_states(name, parameter)
        return found

    def _high_precision(self, parameter: nn.Parameter, *, mine: bool) -> list[tuple[str, int, Tensor]]:
        """Master weights and shaped optimizer states of a parameter that are here, as (kind, start, flat tensor)."""
        if hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            if mapping is None:
                return []
            start = mapping.lp_fragment_address.start
            states = mapping.optim_fragment or {}
            return [(MASTER, start, mapping.hp_fragment), *((kind, start, states[kind]) for kind in sorted(states))]
        states = self._inner.state.get(parameter, {})
        whole = {kind: states[kind] for kind in self._kind.shaped if states.get(kind) is not None}
        return [(kind, 0, whole[kind].reshape(-1)) for kind in sorted(whole)] if mine else []

    def _whole_states(self, name: str, parameter: nn.Parameter) -> list[Piece]:
        """What the optimizer keeps for a parameter in other shapes than its own."""
        found = []
        states = self._inner.state.get(parameter, {})
        for kind in self._kind.other:
            if kind in states:
                found.append(Piece(kind=kind, name=name, region=_whole(states[kind]), tensor=states[kind].reshape(-1)))
        for kind in self._kind.numbers:
            held = number_of(self._inner, parameter, self._groups[name], kind)
            if held is not None and self._updates:
                number = torch.tensor(held, dtype=torch.float64)
                found.append(Piece(kind=kind, name=name, region=Region.of(()), tensor=number.reshape(-1)))
        return found

    def averaged(self) -> AbstractContextManager[None]:
        """Inside it the weights are those that are evaluated and exported (`jllm.train.optim.averaged`)."""
        return averaged(self._engine)

    @property
    def optimizer_steps(self) -> int:
        """How many updates the optimizer has made, which AdamW's bias correction depends on."""
        return self._updates

    def missing_state(self, reader: CheckpointReader) -> str | None:
        """The first state that this process's optimizer goes on from and the checkpoint does not have, or None."""
        for name, parameter in self._parameters.items():
            # ZeRO gives a parameter no mapping where this rank owns none of it.
            if parameter.requires_grad and getattr(parameter, "_hp_mapping", self) is not None:
                for kind in self._needed(name, parameter):
                    if reader.shape(kind, name) is None:
                        return f"{kind} of {name}"
        return None

    def _needed(self, name: str, parameter: nn.Parameter) -> tuple[str, ...]:
        """The kinds of state without which the optimizer cannot go on with a parameter."""
        if self._name == "muon":
            return ("momentum_buffer",) if self._groups[name]["is_matrix"] else ("exp_avg", "exp_avg_sq", "step")
        if self._name == "adamw_kahan" and parameter.dtype == torch.float32:
            return ("exp_avg", "exp_avg_sq", "step")
        return (*self._kind.shaped, *self._kind.numbers)

    def check(self, reader: CheckpointReader) -> None:
        """Compare what `load` will read with its checksums; no other process is waited for.

        Raises:
            DamagedCheckpointError: something is not what was written.
        """
        for name, parameter in self._parameters.items():
            for part in parts_of(parameter):
                reader.check(WEIGHT, name, part.region)
            mapping = getattr(parameter, "_hp_mapping", None)
            start, stop = 0, parameter.numel()
            if mapping is not None:
                start = mapping.lp_fragment_address.start
                stop = start + mapping.lp_fragment_address.numel
            if parameter.requires_grad and getattr(parameter, "_hp_mapping", self) is not None:
                regions = [part.region for part in parts_of(parameter, start, stop)]
                for kind in reader.kinds - {WEIGHT}:
                    shape = reader.shape(kind, name)
                    if shape is not None:
                        for region in regions if shape == whole_shape(parameter) else [Region.of(shape)]:
                            reader.check(kind, name, region)

    def load(self, reader: CheckpointReader, optimizer_steps: int, *, fresh_optimizer: bool = False) -> None:
        """Take everything from a checkpoint: weights, masters, and, unless it starts afresh, optimizer state.

        A checkpoint of the same model, and without `fresh_optimizer` one that has no `missing_state` on any process.
        """
        self._load_weights(reader)
        # ZeRO gathers the weights anew from every rank's masters.
        refresh = getattr(self._engine.optimizer, "update_lp_params", None)
        if refresh is not None:
            refresh()
        if fresh_optimizer:
            self._make_optimizer_state(0)
        else:
            self._load_optimizer(reader, optimizer_steps)

    def _load_weights(self, reader: CheckpointReader) -> None:
        """Take the weights, and the master weights where there are any (else they start from the weights)."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                weight = _read(reader, WEIGHT, name, parameter)
                assert weight is not None, name
                parameter.copy_(weight.view(parameter.shape))
                mapping = getattr(parameter, "_hp_mapping", None)
                if mapping is not None:
                    start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                    master = _read(reader, MASTER, name, parameter, start, start + count)
                    mapping.hp_fragment.copy_(weight[start : start + count] if master is None else master)
                elif not hasattr(parameter, "_hp_mapping") and parameter.dtype == torch.float32:
                    # A full-precision weight is its own master.
                    master = _read(reader, MASTER, name, parameter)
                    if master is not None:
                        parameter.copy_(master.view(parameter.shape))

    def _load_optimizer(self, reader: CheckpointReader, optimizer_steps: int) -> None:
        """Take the optimizer's state."""
        self._make_optimizer_state(optimizer_steps)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if not parameter.requires_grad:
                    continue
                for kind, start, tensor in self._high_precision(parameter, mine=True):
                    if kind == MASTER:
                        continue
                    stored = _read(reader, kind, name, parameter, start, start + tensor.numel())
                    assert stored is not None, (kind, name)
                    tensor.copy_(stored)
                for piece in self._whole_states(name, parameter):
                    stored = reader.read(piece.kind, name, piece.region)
                    assert stored is not None, (piece.kind, name)
                    if piece.kind in self._kind.other:
                        piece.tensor.copy_(stored)
                    else:
                        set_number(self._inner, parameter, self._groups[name], piece.kind, float(stored))

    def _make_optimizer_state(self, optimizer_steps: int) -> None:
        """An optimizer makes its state at its first step; a resumed run needs the place for it before."""
        self._updates = optimizer_steps
        if not optimizer_steps and self._name != "adamw":
            return
        make_state(self._inner, self._name)
        if self._name == "adamw":
            for state in self._inner.state.values():
                state[STEP].fill_(float(optimizer_steps))
        link = getattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()


def _pieces(kind: str, name: str, parameter: Tensor, start: int, run: Tensor) -> list[Piece]:
    """A flat run of a parameter's elements, or of a state of their shape, that begins at `start`."""
    parts = parts_of(parameter, start, start + run.numel())
    return [Piece(kind=kind, name=name, region=part.region, tensor=part.of(run)) for part in parts]


def _read(
    reader: CheckpointReader, kind: str, name: str, parameter: Tensor, start: int = 0, stop: int | None = None
) -> Tensor | None:
    """The inverse: what a checkpoint has of a run."""
    return read_parts(lambda region: reader.read(kind, name, region), parameter, start, stop)


def _whole(state: Tensor) -> Region:
    """All of a state of another shape than its parameter's."""
    return Region.of(tuple(state.shape))
