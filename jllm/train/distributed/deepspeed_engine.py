"""DeepSpeed set-up: the pipeline module and its engine.

One DeepSpeed layer is one stage. What differs from DeepSpeed's own classes:

* tied embeddings are one parameter of the first stage and one of the last, kept equal by summing their gradients;
* the fp32 gradient norm counts a parameter once that several ranks have, and covers all stages and slices;
* a gradient of which the slices of a stage have parts is summed with those of tied weights;
* nothing of the set-up is printed.

Cost of bf16: 2 bytes a parameter for the weight, 4 for the fp32 sum of gradients, and 12 for master weight and AdamW's
two moments, these divided by the data-parallel size. A gradient itself is there only until it is added to the sum.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import Tensor, nn
from torch.nn import Parameter

from jllm.errors import UserError
from jllm.models.pipeline.carving import structure_of, tied_parameter
from jllm.models.pipeline.stage import PipelineStage
from jllm.models.tensor_parallel.marks import partial_gradient, repeats
from jllm.parallel.mesh import Mesh, Place
from jllm.train.config import TrainConfig
from jllm.train.data.collate import MicroBatch
from jllm.train.distributed import launch
from jllm.train.distributed.deepspeed_settings import deepspeed_settings
from jllm.train.distributed.host_optimizer import HostOptimizer
from jllm.train.distributed.master_optimizer import MasterOptimizer
from jllm.train.distributed.overlapped import OverlappedSchedule, Transfers
from jllm.train.shape import RunShape


class Pipeline(PipelineModule):
    """The stages of one model over the processes of a run; this process builds its own.

    Where the micro-batches of a step differ in shape, the stages tell each other every one's.
    """

    def __init__(self, stage: PipelineStage, mesh: Mesh, *, shapes_vary: bool) -> None:
        self.mesh = mesh
        with launch.quiet():
            super().__init__(
                layers=[stage] * mesh.pipe,  # of which this process keeps the one at its own place
                topology=topology_of(mesh),
                partition_method="uniform",
                loss_fn=None,
                dynamic_shape=shapes_vary,
            )
        for parameter in self.parameters():  # DeepSpeed has set all of them to False
            parameter.ds_pipe_replicated |= repeats(parameter)  # type: ignore[attr-defined]
        self._partial = [
            (parameter, group)
            for parameter in self.parameters()
            if parameter.requires_grad and (group := partial_gradient(parameter)) is not None
        ]

    def _index_tied_modules(self) -> dict[str, Any]:
        """DeepSpeed's record of tied weights, for the embedding on the first stage and the head on the last."""
        stage = self.forward_funcs[0]
        span = stage.span
        # Of a frozen model nothing is trained, so nothing is kept equal.
        if span.count == 1 or stage.is_frozen or not structure_of(stage.model).tied:
            return {}
        found: dict[str, Any] = {}
        place = self.mesh.place(self.global_rank)
        for ranks in self.mesh.ends:
            group = dist.new_group(ranks=list(ranks))  # every process takes part in making every group
            if place.rank in ranks:
                tied = tied_parameter(stage.model, span)
                assert tied is not None
                holder = nn.Module()
                holder.weight = tied[1]
                found[tied[0]] = {"ranks": list(ranks), "group": group, "weight_attr": ["weight"], "module": holder}
                tied[1].ds_pipe_replicated = not place.leads(ranks)  # type: ignore[attr-defined]
        return found

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        tied = [(comm["module"].weight, comm["group"]) for comm in self.tied_comms.values()]
        return [*((weight, group) for weight, group in tied if weight.requires_grad), *self._partial]


class TrainingEngine(PipelineEngine):
    """DeepSpeed's pipeline engine, with exact gradient norms and micro-batches of a new shape at any step."""

    _length: int | None = None
    _global_grad_norm: Tensor | None = None

    def __init__(self, *args: Any, offloads: bool, place: Place, overlaps: bool, **kwargs: Any) -> None:
        self._offloads, self.place = offloads, place
        super().__init__(*args, **kwargs)
        self._transfers = Transfers(place) if overlaps and place.mesh.pipe > 1 else None
        # DeepSpeed's pipeline knows its optimizer for bf16 by the very class.
        self.using_bf16_optimizer = isinstance(self.optimizer, MasterOptimizer)

    def _configure_bf16_optimizer(self, optimizer: torch.optim.Optimizer) -> MasterOptimizer:
        kind = HostOptimizer if self._offloads else MasterOptimizer
        return kind(
            optimizer,
            self.param_names,
            bfloat16_config=self._config.bfloat16_config,
            mpu=self.mpu,
            clip_grad=self.gradient_clipping(),
            allgather_bucket_size=self.zero_allgather_bucket_size(),
            dp_process_group=self.seq_data_parallel_group,
            grad_acc_dtype=torch.float32,
        )

    def allreduce_and_copy(self, small_bucket: list[Tensor], dp_group: Any, dp_world_size: int | None = None) -> None:
        """Average gradients over pipelines. Of one pipeline they stay where they are: DeepSpeed would lay them end to
        end, perhaps in another type, and copy them back."""
        if max(dist.get_world_size(group=dp_group), dp_world_size or 1) > 1:
            super().allreduce_and_copy(small_bucket, dp_group, dp_world_size)

    def clip_fp32_gradients(self) -> None:
        """Nothing: where DeepSpeed asks for it, gradients were clipped with the number that tells whether to step."""

    def _norm_of(self, parameters: list[Parameter]) -> Tensor:
        """The joint norm of the gradients of all stages and slices, fp32; each of these parameters has one."""
        counted = [
            each.grad for each in parameters if each.grad is not None and not getattr(each, "ds_pipe_replicated", False)
        ]
        total = torch.zeros((), device=self.device)
        if counted:
            total = torch.stack(torch._foreach_norm(counted, dtype=torch.float32)).square().sum()
        dist.all_reduce(total, group=self.grid.get_model_parallel_group())  # of one pipeline's ranks
        return total.sqrt()

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        if not self.zero_optimization():
            # The device has nothing to do from when the host asks for the norm until it clips. So all that the host
            # needs for that is at hand before: going through the modules takes it a millisecond.
            parameters = [each for each in self.module.parameters() if each.grad is not None]
            gradients = [each.grad for each in parameters]
            self._global_grad_norm = self._norm_of(parameters)
            norm = float(self._global_grad_norm)
            if not math.isfinite(norm):
                # ZeRO's optimizers make no step then; nor does this one, so that the weights stay good.
                self.zero_grad()
                return
            if gradients and not (self.fp16_enabled() or self.bfloat16_enabled()):
                # A number is multiplied faster than a tensor.
                limit = self.gradient_clipping()
                scale = limit / (norm + 1e-6) if limit > 0 else 1.0
                if scale < 1.0:
                    torch._foreach_mul_(gradients, scale)
        super()._exec_optimizer_step(lr_kwargs)

    def _train_schedule(self) -> Any:
        if self._transfers is None:
            return super()._train_schedule()
        self._transfers.begin(self.micro_batches)
        return OverlappedSchedule(micro_batches=self.micro_batches, stages=self.num_stages, stage_id=self.stage_id)

    @property
    def _overlapping(self) -> Transfers | None:
        """What is under way; None where passes wait for it, as in evaluations."""
        return self._transfers if self.module.training else None

    def _exec_send_activations(self, buffer_id: int) -> None:
        transfers = self._overlapping
        if transfers is None or self.first_output_send:  # the first time with the shape
            super()._exec_send_activations(buffer_id)
        else:
            transfers.send_activation(self.pipe_buffers["outputs"][buffer_id])

    def _exec_recv_activations(self, buffer_id: int) -> None:
        transfers, is_first_time = self._overlapping, self.pipe_recv_buf is None
        if transfers is None or is_first_time:
            super()._exec_recv_activations(buffer_id)
        if transfers is None:
            return
        like: tuple[Tensor, Tensor] = self.pipe_recv_buf
        if is_first_time:
            transfers.has_arrived("activations")
            transfers.expect_activation(like)
        else:
            hidden, planes = transfers.receive_activation(like)
            self.pipe_buffers["inputs"][buffer_id] = (hidden.requires_grad_(), planes)

    def _exec_send_grads(self, buffer_id: int) -> None:
        if (transfers := self._overlapping) is None:
            super()._exec_send_grads(buffer_id)
            return
        transfers.send_gradient(self.pipe_buffers["inputs"][buffer_id][0].grad)
        self.pipe_buffers["inputs"][buffer_id] = None

    def _exec_recv_grads(self, buffer_id: int) -> None:
        if (transfers := self._overlapping) is None:
            super()._exec_recv_grads(buffer_id)
        else:
            self.grad_layer = [transfers.receive_gradient(self.pipe_buffers["outputs"][buffer_id][0])]

    def _exec_reduce_tied_grads(self) -> None:
        if self._transfers is not None:
            self._transfers.end()
        super()._exec_reduce_tied_grads()

    @property
    def gradient_norm(self) -> float:
        """The norm of the last step's gradients over all stages and slices, before clipping."""
        return float("nan") if self._global_grad_norm is None else float(self._global_grad_norm)

    @property
    def gradient_scale(self) -> float:
        """What DeepSpeed multiplies a micro-batch's loss with in the next step, with the loss scale of fp16."""
        scale: float = self._get_optimizer_loss_scale() if self.fp16_enabled() else 1.0
        return float(scale / self.gradient_accumulation_steps())

    def _new_length(self, length: int) -> None:
        # The stages tell each other a micro-batch's shape once; a new length makes them do so again.
        if self._length not in (None, length):
            self.reset_activation_shape()
        self._length = length

    def train_step(self, micro_batches: Sequence[MicroBatch] | None, length: int) -> float:
        """One optimizer step; `micro_batches` on the first stage only. The loss, as the objective in use scales it."""
        self._new_length(length)
        return float(self.train_batch(data_iter=self._iterator(micro_batches)))

    def eval_step(self, micro_batches: Sequence[MicroBatch] | None, length: int, count: int) -> float:
        """`count` micro-batches forward; the sum of what the last stages return, over all pipelines."""
        self._new_length(length)
        # A stage's receive buffer belongs to its mode: a training buffer asks for gradients.
        self.reset_activation_shape()
        mean = self.eval_batch(data_iter=self._iterator(micro_batches), num_micro_batches=count)
        self.reset_activation_shape()
        total: float = float(mean) * count * self.place.mesh.copies
        return total

    def _iterator(self, micro_batches: Sequence[MicroBatch] | None) -> Iterator[Any] | None:
        if self.is_first_stage():
            assert micro_batches is not None
            return ((self._on_device(batch.sent), None) for batch in micro_batches)
        return itertools.repeat((None, None)) if self.is_last_stage() else None

    def _on_device(self, sent: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """What a micro-batch is sent as, on the device: from pinned memory, so that the host need not wait for what the
        device does before the copy."""
        if self.device.type != "cuda":
            return sent
        return tuple(each.pin_memory().to(self.device, non_blocking=True) for each in sent)


# DeepSpeed finds the methods of its instructions in a table, not by name.
TrainingEngine._INSTRUCTION_MAP = {
    instruction: getattr(TrainingEngine, method.__name__)
    for instruction, method in PipelineEngine._INSTRUCTION_MAP.items()
}


def topology_of(mesh: Mesh) -> ProcessTopology:
    """The mesh in DeepSpeed's terms, which works along two axes; the name of the third one it does not know.

    Sequence ranks lie inside its data axis: they hold the same weights, and their gradients add up as those of other
    rows do.
    """
    sizes = {"data": mesh.copies, "pipe": mesh.pipe, "tensor": mesh.tensor}
    axes = [axis for axis in mesh.order if axis in ("data", "pipe") or (axis == "tensor" and mesh.tensor > 1)]
    topology = ProcessTopology(axes=axes, dims=[sizes[axis] for axis in axes])
    for rank in mesh.ranks:
        place = mesh.place(rank)
        found = {"data": place.copy, "pipe": place.pipe, "tensor": place.tensor}
        topology.mapping[topology.ProcessCoord(**{axis: found[axis] for axis in axes})] = rank
    return topology


def check_precision(config: TrainConfig) -> None:
    """Raises:
    UserError: the device does not work with `--precision`.
    """
    accelerator = get_accelerator()
    works = {"bf16": accelerator.is_bf16_supported, "fp16": accelerator.is_fp16_supported, "fp32": lambda: True}
    if not works[config.precision]():
        others = " or ".join(name for name in works if name != config.precision and works[name]())
        raise UserError(
            f"--precision {config.precision}: the device of this run ({accelerator.device_name()}) does not work with"
            f" it; give {others}"
        )


def build_engine(
    stage: PipelineStage, optimizer: torch.optim.Optimizer, config: TrainConfig, shape: RunShape
) -> TrainingEngine:
    """The engine of this process."""
    module = Pipeline(stage, shape.mesh, shapes_vary=config.batch_size_tokens is not None)
    mpu = module.mpu()
    settings = deepspeed_settings(config, shape)
    with launch.quiet():
        return TrainingEngine(
            args=None,
            model=module,
            optimizer=optimizer,
            model_parameters=None,
            training_data=None,
            lr_scheduler=None,
            mpu=mpu,
            dist_init_required=False,
            collate_fn=None,
            config=settings,
            config_class=DeepSpeedConfig(settings, mpu),
            offloads=config.offload_optimizer,
            place=shape.mesh.place(dist.get_rank()),
            overlaps=config.overlaps,
        )
