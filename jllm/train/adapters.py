"""What the options say about adapters, put to work: where they go, on a stage, in costs, and in what a run leaves.

LoRA needs peft, which `jllm.train.checks.packages` has imported where it is asked for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from jllm.errors import UserError
from jllm.models.adapters.adapter_folder import AdapterFolder
from jllm.models.adapters.control import attach_control
from jllm.models.adapters.control_folder import control_folder
from jllm.models.pipeline.structure import whole_structure
from jllm.models.trainable import grouped, is_inside, parse_layers
from jllm.models.weights.quantisation import QuantisationPlan
from jllm.models.weights.source import bare_model
from jllm.train.config import TrainConfig

if TYPE_CHECKING:  # peft is not there in every installation
    from jllm.models.adapters.lora_plan import LoraChoice, LoraPlan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Tell = Callable[[Mapping[str, Tensor]], None]
"""What has to be called with the planes of every micro-batch before its forward pass."""


class Adapters(Protocol):
    """The adapters of a run, beside a frozen model."""

    def attach(self, model: PreTrainedModel) -> Tell | None:
        """Give a stage, loaded and sealed, or a model without memory, the adapters that go there.

        Raises:
            UserError: `--lora` does not fit the model.
        """

    @property
    def folder(self) -> AdapterFolder:
        """What a run leaves."""

    def said(self) -> list[str]:
        """For people, a line each: what has adapters, and what was left out."""


@dataclass(frozen=True, kw_only=True)
class LoraOfRun:
    """LoRA adapters.

    Attributes:
        config: the options.
        plan: where they go in the whole model.
        origin, family: the model's configuration and class.
    """

    config: TrainConfig
    plan: "LoraPlan"
    origin: PretrainedConfig
    family: type[PreTrainedModel]

    def attach(self, model: PreTrainedModel) -> Tell | None:
        from jllm.models.adapters.lora import attach_lora
        from jllm.models.adapters.peft_folder import load_adapter

        attach_lora(
            model,
            self.plan,
            seed=self.config.seed,
            dtype=DTYPES[self.config.adapter_precision],
            multiplies_in_model_type=self._multiplies_in_model_type,
        )
        if self.config.lora is not None and model.device.type != "meta":
            load_adapter(model, self.config.lora, self.plan.config, origin=self.origin, family=self.family)
        return None

    @property
    def _multiplies_in_model_type(self) -> bool:
        sizes = self.config.model_parallel_size, self.config.sequence_parallel_size
        if self.plan.config.use_dora or max(sizes) > 1:
            return False
        if self.config.lora_compute == "auto":
            from deepspeed.accelerator import get_accelerator  # a folder of a checkpoint is made without DeepSpeed

            return bool(get_accelerator().device_name() == "cuda")
        return self.config.lora_compute == "model"

    @property
    def folder(self) -> AdapterFolder:
        from jllm.models.adapters.peft_folder import lora_folder

        return lora_folder(self.plan.config)

    def said(self) -> list[str]:
        modules = len(self.plan.modules) + len(self.plan.parameters)
        rank, alpha = self.plan.config.r, self.plan.config.lora_alpha
        lines = [f"LoRA of rank {rank}, alpha {alpha:g}, on {modules} modules of a frozen model"]
        if self._multiplies_in_model_type and self.config.adapter_precision != self.config.precision:
            own, model = self.config.adapter_precision, self.config.precision
            lines.append(f"adapters are {own}, and multiply in {model} (--lora_compute adapter: in {own})")
        return lines + [f"without an adapter: {line}" for line in self.plan.left_out]


@dataclass(frozen=True, kw_only=True)
class ControlOfRun:
    """Control adapters.

    Attributes:
        config: the options.
        rank: of the adapters.
        prefix: the dotted name of the model's decoder layers.
        layers: numbers of those that get one.
        width: of the hidden states.
    """

    config: TrainConfig
    rank: int
    prefix: str
    layers: frozenset[int]
    width: int

    def attach(self, model: PreTrainedModel) -> Tell | None:
        return attach_control(
            model,
            rank=self.rank,
            prefix=self.prefix,
            layers=self.layers,
            width=self.width,
            seed=self.config.seed,
            dtype=DTYPES[self.config.adapter_precision],
        ).tell

    @property
    def folder(self) -> AdapterFolder:
        return control_folder(rank=self.rank, layers=self.layers, base=str(self.config.model))

    def said(self) -> list[str]:
        return [f"control adapters of rank {self.rank} on {len(self.layers)} layers of a frozen model"]


def find_adapters(
    config: TrainConfig,
    origin: PretrainedConfig,
    family: type[PreTrainedModel],
    quantisation: QuantisationPlan | None = None,
) -> Adapters | None:
    """The adapters that the options ask for; None where the model itself is trained.

    `quantisation` is what of the model is held in 4 or 8 bits.

    Raises:
        UserError: the adapters do not fit the model.
    """
    if config.has_control:
        return _find_control(config, origin, family)
    return _find_lora(config, origin, family, quantisation) if config.has_lora else None


def _find_control(config: TrainConfig, origin: PretrainedConfig, family: type[PreTrainedModel]) -> ControlOfRun:
    place = place_of_control(vars(config), origin, family)
    return ControlOfRun(config=config, rank=place.rank, prefix=place.prefix, layers=place.layers, width=place.width)


@dataclass(frozen=True, kw_only=True)
class ControlPlace:
    """Where control adapters go; the fields are those of `ControlOfRun`."""

    rank: int
    prefix: str
    layers: frozenset[int]
    width: int


def place_of_control(
    options: Mapping[str, Any], origin: PretrainedConfig, family: type[PreTrainedModel]
) -> ControlPlace:
    """What options, of a run or those that a checkpoint keeps of its run, say of control adapters.

    Raises:
        UserError: there are no such layers, or the rank is too large.
    """
    structure = whole_structure(bare_model(origin, family, dtype=torch.float32))
    layers = list(range(structure.num_layers))
    if (given := options["control_adapter_layers"]) is not None:
        layers = parse_layers(given, structure.num_layers, option="--control_adapter_layers")
    rank, width = options["control_adapter_rank"], origin.get_text_config(decoder=True).hidden_size
    if rank > width:
        raise UserError(
            f"--control_adapter_rank {rank}: the model's hidden states have {width} dimensions; give at most {width}"
        )
    return ControlPlace(rank=rank, prefix=structure.layers, layers=frozenset(layers), width=width)


def _find_lora(
    config: TrainConfig,
    origin: PretrainedConfig,
    family: type[PreTrainedModel],
    quantisation: QuantisationPlan | None,
) -> LoraOfRun:
    from jllm.models.adapters.lora_plan import plan_lora, targets_of
    from jllm.models.adapters.peft_folder import check_adapter, read_adapter_config

    if config.lora is not None:
        stored = read_adapter_config(config.lora)
        plan = targets_of(stored, origin, family)
        check_adapter(config.lora, plan, origin=origin, family=family)
        _check_compute(config, plan, option=f"--lora {config.lora}, which has DoRA,")
        _check_quantised(plan, quantisation, option=f"--lora {config.lora}")
        return LoraOfRun(config=config, plan=plan, origin=origin, family=family)
    choice = chosen_adapters(vars(config))
    plan = plan_lora(origin, family, choice)
    if config.model_parallel_size > 1:
        _check_sliced(config, plan, whole_structure(bare_model(origin, family, dtype=torch.float32)).layers)
    _check_compute(config, plan, option="--use_dora")
    _check_quantised(plan, quantisation, option="--lora_target_modules")
    return LoraOfRun(config=config, plan=plan, origin=origin, family=family)


def _check_sliced(config: TrainConfig, plan: "LoraPlan", layers: str) -> None:
    """Raises:
    UserError: an adapter beside something else than a linear map of a decoder layer.
    """
    outside = [*plan.parameters, *(name for name in plan.modules if not name.startswith(f"{layers}."))]
    if outside:
        raise UserError(
            f"--model_parallel_size {config.model_parallel_size} with an adapter on {outside[0]}: slices have them on"
            " linear maps of decoder layers; name those with --lora_target_modules"
        )


def _check_compute(config: TrainConfig, plan: "LoraPlan", *, option: str) -> None:
    """Raises:
    UserError: DoRA that is to multiply in the model's type.
    """
    if plan.config.use_dora and config.lora_compute == "model":
        raise UserError(f"{option} and --lora_compute model: DoRA's norms need the adapters' own type; drop one")


def _check_quantised(plan: "LoraPlan", quantisation: QuantisationPlan | None, *, option: str) -> None:
    """Raises:
    UserError: packed experts in 4 bits that would get an adapter, what would be trained whole in few bits, or DoRA on
        weights in 8 bits.
    """
    if quantisation is None:
        return
    if plan.config.use_dora and quantisation.quantisation.bits == 8 and quantisation.modules.intersection(plan.modules):
        asked = "--use_dora" if option == "--lora_target_modules" else f"{option}, which has DoRA,"
        raise UserError(
            f"{asked} beside a model in 8 bits: peft has no DoRA on weights in 8 bits; give --load_in_4bit, or drop it"
        )
    if quantised := quantisation.experts.intersection(plan.parameters):
        raise UserError(
            f"{option} names packed experts ({grouped(quantised)}), which have no adapter in 4 bits; leave them out, or"
            " give --skip_quant experts"
        )
    if trained := {name for name in quantisation.modules if is_inside(name, plan.saved)}:
        raise UserError(
            f"--modules_to_save: {grouped(trained)} is in {quantisation.quantisation}, and cannot be trained whole;"
            " leave it out, or name it in --skip_quant too"
        )


def chosen_adapters(options: Mapping[str, Any]) -> "LoraChoice":
    """What options say of new adapters: those of a run, or those that a checkpoint keeps of its run."""
    from jllm.models.adapters.lora_plan import LoraChoice

    rank, alpha = options["lora_dim"], options["lora_alpha"]
    return LoraChoice(
        rank=rank,
        alpha=rank if alpha is None else alpha,
        dropout=options["lora_dropout"],
        targets=options["lora_target_modules"],
        layers=options["lora_layers"],
        init=options["lora_init"],
        use_rslora=options["use_rslora"],
        use_dora=options["use_dora"],
        saved=options["modules_to_save"],
        base=str(options["model"]),
    )
