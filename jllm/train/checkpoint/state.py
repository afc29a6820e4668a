"""Weights, master weights and optimizer state by parameter name, whatever DeepSpeed's optimizer makes of them.

With ZeRO stage 1 each data-parallel rank owns a run of one long flat fp32 tensor; DeepSpeed records on every
parameter which part of it this rank holds. Without, every rank holds everything, and the ranks of a stage divide the
parameters among themselves for saving. Either way a `Piece` says which region of which parameter is here.

Cost: views only; nothing is copied.
"""

import torch
from torch import Tensor, nn

from jllm.models.pipeline.stage import PipelineStage
from jllm.train.checkpoint.format import Piece
from jllm.train.checkpoint.reader import CheckpointReader
from jllm.train.checkpoint.regions import Region
from jllm.train.distributed.deepspeed_engine import TrainingEngine

WEIGHT = "weight"
MASTER = "master"
STEP = "step"
ADAMW_STATES = ("exp_avg", "exp_avg_sq")


class TrainingState:
    """The state of this process's stage, as pieces with names that do not depend on the number of stages."""

    def __init__(self, engine: TrainingEngine, stage: PipelineStage) -> None:
        self._engine = engine
        self._stage = stage
        self._parameters = stage.stored_parameters()
        optimizer = engine.optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        assert isinstance(inner, torch.optim.Optimizer)
        self._inner = inner

    def _copied_from_first_stage(self, parameter: nn.Parameter) -> bool:
        return bool(getattr(parameter, "ds_pipe_replicated", False))

    def pieces(self, *, alone: bool = False) -> list[Piece]:
        """What this process has to save: its share of its stage, or, `alone`, all that it needs to go on by itself."""
        found = []
        for number, (name, parameter) in enumerate(self._parameters.items()):
            if self._copied_from_first_stage(parameter) and not alone:
                continue
            region = region_of(parameter)
            mine = alone or self._engine.place.owns(number)
            if mine:
                found.append(Piece(kind=WEIGHT, name=name, region=region, tensor=parameter.detach().reshape(-1)))
            if not parameter.requires_grad:
                continue
            for kind, start, tensor in self._high_precision(parameter, mine=mine):
                run = region.run(start, start + tensor.numel())
                found.append(Piece(kind=kind, name=name, region=run, tensor=tensor.detach()))
        return found

    def _high_precision(self, parameter: nn.Parameter, *, mine: bool) -> list[tuple[str, int, Tensor]]:
        """Master weights and optimizer states of a parameter that are here, as (kind, start, flat tensor)."""
        if hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            if mapping is None:
                return []
            start = mapping.lp_fragment_address.start
            states = mapping.optim_fragment or {}
            return [(MASTER, start, mapping.hp_fragment), *((kind, start, states[kind]) for kind in sorted(states))]
        states = self._inner.state.get(parameter, {})
        whole = {
            kind: value for kind, value in states.items() if torch.is_tensor(value) and value.shape == parameter.shape
        }
        return [(kind, 0, whole[kind].reshape(-1)) for kind in sorted(whole)] if mine else []

    @property
    def optimizer_steps(self) -> int:
        """How many updates the optimizer has made, which AdamW's bias correction depends on."""
        counts = [int(state[STEP]) for state in self._inner.state.values() if STEP in state]
        return max(counts, default=0)

    def missing_state(self, reader: CheckpointReader) -> str | None:
        """The first state that this process's optimizer goes on from and the checkpoint does not have, or None."""
        kinds = ADAMW_STATES if isinstance(self._inner, torch.optim.AdamW) else ()
        for name, parameter in self._parameters.items():
            # ZeRO gives a parameter no mapping where this rank owns none of it.
            if parameter.requires_grad and getattr(parameter, "_hp_mapping", self) is not None:
                for kind in kinds:
                    if reader.shape(kind, name) is None:
                        return f"{kind} of {name}"
        return None

    def check(self, reader: CheckpointReader) -> None:
        """Compare what `load` will read with its checksums; no other process is waited for.

        Raises:
            DamagedCheckpointError: something is not what was written.
        """
        for name, parameter in self._parameters.items():
            region = region_of(parameter)
            reader.check(WEIGHT, name, region)
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                start = mapping.lp_fragment_address.start
                region = region.run(start, start + mapping.lp_fragment_address.numel)
            if parameter.requires_grad and getattr(parameter, "_hp_mapping", self) is not None:
                for kind in reader.kinds - {WEIGHT}:
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
                region = region_of(parameter)
                weight = reader.read(WEIGHT, name, region)
                assert weight is not None, name
                parameter.copy_(weight.view(parameter.shape))
                mapping = getattr(parameter, "_hp_mapping", None)
                if mapping is not None:
                    start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                    master = reader.read(MASTER, name, region.run(start, start + count))
                    mapping.hp_fragment.copy_(weight[start : start + count] if master is None else master)
                elif not hasattr(parameter, "_hp_mapping") and parameter.dtype == torch.float32:
                    # A full-precision weight is its own master.
                    master = reader.read(MASTER, name, region)
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
                    stored = reader.read(kind, name, region_of(parameter).run(start, start + tensor.numel()))
                    assert stored is not None, (kind, name)
                    tensor.copy_(stored)

    def _make_optimizer_state(self, optimizer_steps: int) -> None:
        """AdamW makes its state at its first step; a resumed run needs the place for it before."""
        if not isinstance(self._inner, torch.optim.AdamW):
            return
        for group in self._inner.param_groups:
            for parameter in group["params"]:
                place = parameter.device if group["fused"] else "cpu"  # as torch itself makes it
                self._inner.state[parameter] = {
                    STEP: torch.tensor(float(optimizer_steps), dtype=torch.float32, device=place),
                    **{kind: torch.zeros_like(parameter) for kind in ADAMW_STATES},
                }
        link = getattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()


def region_of(parameter: nn.Parameter) -> Region:
    """Which elements of its whole tensor a parameter of this process has: all of them."""
    return Region.of(tuple(parameter.shape))
