"""What the options say about adapters, put to work: where they go, on a stage, in costs, and in what a run leaves.

Needs peft, which `jllm.train.checks.packages` has imported where adapters are asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from jllm.models.weights.saving import ExportedFolder
from jllm.train.config import TrainConfig

if TYPE_CHECKING:  # peft is not there in every installation
    from jllm.models.adapters.lora_plan import LoraChoice, LoraPlan

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


def find_adapters(config: TrainConfig, origin: PretrainedConfig, family: type[PreTrainedModel]) -> Adapters | None:
    """The adapters that the options ask for; None where the model itself is trained.

    Raises:
        UserError: the adapters do not fit the model.
    """
    if not config.has_lora:
        return None
    from jllm.models.adapters.lora_plan import plan_lora, targets_of
    from jllm.models.adapters.peft_folder import check_adapter, read_adapter_config

    if config.lora is not None:
        stored = read_adapter_config(config.lora)
        plan = targets_of(stored, origin, family)
        check_adapter(config.lora, plan, origin=origin, family=family)
        return Adapters(config=config, plan=plan, origin=origin, family=family)
    choice = chosen_adapters(vars(config))
    return Adapters(config=config, plan=plan_lora(origin, family, choice), origin=origin, family=family)


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
