"""What the options say about adapters, put to work: where they go, on a stage, in costs, and in what a run leaves.

Needs peft, which `jllm.train.checks.packages` has imported where adapters are asked for.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig, PreTrainedModel

from jllm.errors import UserError
from jllm.models.trainable import grouped, is_inside
from jllm.models.weights.quantisation import QuantisationPlan
from jllm.models.weights.saving import ExportedFolder
from jllm.train.config import TrainConfig

if TYPE_CHECKING:  # peft is not there in every installation
    from jllm.models.adapters.lora_plan import LoraPlan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """The adapters of a run.

    Attributes:
        config: the options.
        plan: where they go in the whole model.
        origin, family: the model's configuration and class.
    """

    config: TrainConfig
    plan: "LoraPlan"
    origin: PretrainedConfig
    family: type[PreTrainedModel]

    def attach(self, model: PreTrainedModel) -> None:
        """Give a stage, loaded and sealed, or a model without memory, the adapters that go there.

        Raises:
            UserError: `--lora` does not fit the model.
        """
        from jllm.models.adapters.lora import attach_lora
        from jllm.models.adapters.peft_folder import load_adapter

        attach_lora(model, self.plan, seed=self.config.seed, dtype=DTYPES[self.config.adapter_precision])
        if self.config.lora is not None and model.device.type != "meta":
            load_adapter(model, self.config.lora, self.plan.config, origin=self.origin, family=self.family)

    @property
    def folder(self) -> ExportedFolder:
        """What a run leaves."""
        from jllm.models.adapters.peft_folder import AdapterFolder

        return AdapterFolder(config=self.plan.config)

    def said(self) -> list[str]:
        """For people, a line each: what has adapters, and what was left out."""
        modules = len(self.plan.modules) + len(self.plan.parameters)
        rank, alpha = self.plan.config.r, self.plan.config.lora_alpha
        lines = [f"LoRA of rank {rank}, alpha {alpha:g}, on {modules} modules of a frozen model"]
        return lines + [f"without an adapter: {line}" for line in self.plan.left_out]


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
    if not config.has_lora:
        return None
    from jllm.models.adapters.lora_plan import LoraChoice, plan_lora, targets_of
    from jllm.models.adapters.peft_folder import check_adapter, read_adapter_config

    if config.lora is not None:
        stored = read_adapter_config(config.lora)
        plan = targets_of(stored, origin, family)
        check_adapter(config.lora, plan, origin=origin, family=family)
        _check_quantised(plan, quantisation, option=f"--lora {config.lora}")
        return Adapters(config=config, plan=plan, origin=origin, family=family)
    assert config.lora_dim is not None
    choice = LoraChoice(
        rank=config.lora_dim,
        alpha=config.lora_alpha if config.lora_alpha is not None else config.lora_dim,
        dropout=config.lora_dropout,
        targets=config.lora_target_modules,
        layers=config.lora_layers,
        init=config.lora_init,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        saved=config.modules_to_save,
        base=str(config.model),
    )
    plan = plan_lora(origin, family, choice)
    _check_quantised(plan, quantisation, option="--lora_target_modules")
    return Adapters(config=config, plan=plan, origin=origin, family=family)


def _check_quantised(plan: "LoraPlan", quantisation: QuantisationPlan | None, *, option: str) -> None:
    """Raises:
    UserError: packed experts in 4 bits that would get an adapter, or what would be trained whole in few bits.
    """
    if quantisation is None:
        return
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
