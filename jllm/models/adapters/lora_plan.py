"""Which modules get a LoRA adapter, decided on the whole model before any stage is there.

What peft makes of the configuration that is stored beside the adapters is asked of peft itself, on a model without
memory, so that the folder of a run loads there into the same places. peft cannot address some modules of a few mixtures
of experts, whose names its own conversion takes for packed experts; they are left out, and named.

Guarantees: every stage plans alike; what is targeted is what peft targets when it loads the adapter.
Cost: the model without memory, twice; some milliseconds for each layer.
"""

import copy
import dataclasses
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from jllm.errors import UserError
from jllm.models.pipeline.structure import Structure, find_routers, whole_structure
from jllm.models.trainable import check_matches, grouped, is_inside, matches, parse_layers, patterns_of
from jllm.models.weights.source import bare_model

ALL_LINEAR = "all-linear"
ADAPTER = "default"
"""The name that peft gives an adapter in memory; it is not in the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraChoice:
    """What the user chose.

    Attributes:
        rank: of the adapters.
        alpha: over the rank, what their output is multiplied by.
        dropout: of their input.
        targets: `ALL_LINEAR`, patterns as in `jllm.models.trainable`, or both, by commas.
        layers: of the decoder layers, "0:7,24:31"; None for all, and for what lies around them.
        init: how the first matrix is drawn: kaiming or gaussian.
        use_rslora, use_dora: as in peft.
        saved: patterns of modules that are trained whole.
        base: the model's name, for people who load the adapter.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: str = ALL_LINEAR
    layers: str | None = None
    init: str = "kaiming"
    use_rslora: bool = False
    use_dora: bool = False
    saved: str | None = None
    base: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraPlan:
    """Where adapters go, by names of the whole model.

    Attributes:
        config: what is stored beside the adapters.
        modules: linear maps and embeddings.
        parameters: packed experts and routers, which are no modules of their own.
        saved: modules that are trained whole.
        left_out: for people, a line each: what was not targeted though one might expect it.
    """

    config: LoraConfig
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    saved: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def plan_lora(config: PretrainedConfig, family: type[PreTrainedModel], choice: LoraChoice) -> LoraPlan:
    """Where the adapters that are chosen go.

    Raises:
        UserError: a pattern that matches nothing, nothing that could have an adapter, or what peft refuses.
    """
    model = _bare(config, family)
    structure = whole_structure(model)
    candidates = _Candidates(model)
    within = _within(choice.layers, structure)
    saved = _saved_modules(model, choice.saved)
    wanted: set[str] = set()
    for pattern in patterns_of("--lora_target_modules", choice.targets):
        if pattern.pattern == ALL_LINEAR:
            wanted |= candidates.linear
        else:
            check_matches("--lora_target_modules", pattern, candidates.matrices)
            wanted |= {name for name in candidates.all if matches(pattern, candidates.all[name])}
    wanted = {name for name in wanted if within(name) and not is_inside(name, saved)}
    modules, parameters = wanted - candidates.parameters, wanted & candidates.parameters
    lost = {name for name in modules if not _peft_addresses(model, name)}
    modules -= lost
    if not modules and not parameters:
        raise UserError(
            f"--lora_target_modules {choice.targets!r}"
            + (f" with --lora_layers {choice.layers!r}" if choice.layers else "")
            + " leaves no module that could have an adapter; give names of linear maps, embeddings or packed experts"
        )
    stored = LoraConfig(
        r=choice.rank,
        lora_alpha=int(choice.alpha) if float(choice.alpha).is_integer() else choice.alpha,  # type: ignore[arg-type]
        lora_dropout=choice.dropout,
        use_rslora=choice.use_rslora,
        use_dora=choice.use_dora,
        init_lora_weights=True if choice.init == "kaiming" else "gaussian",
        modules_to_save=_short_names(saved, [name for name, _ in model.named_modules()]) or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=choice.base,
        fan_in_fan_out=any(isinstance(candidates.owners[name], Conv1D) for name in modules),
    )
    _name_targets(stored, model, structure, modules, parameters)
    left_out = [f"{grouped(lost)}: peft cannot have an adapter there in this family"] if lost else []
    left_out += candidates.unnamed(wanted, choice.targets, within)
    plan = LoraPlan(
        config=stored,
        modules=tuple(sorted(modules)),
        parameters=tuple(sorted(parameters)),
        saved=tuple(sorted(saved)),
        left_out=tuple(left_out),
    )
    found = targets_of(stored, config, family)
    assert (found.modules, found.parameters) == (plan.modules, plan.parameters), (found, plan)
    return plan


def targets_of(stored: LoraConfig, config: PretrainedConfig, family: type[PreTrainedModel]) -> LoraPlan:
    """Where peft puts the adapters of a configuration.

    Raises:
        UserError: peft refuses it for this model.
    """
    model = _bare(config, family)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuner: Any = LoraModel(model, copy.deepcopy(stored), ADAPTER, low_cpu_mem_usage=True)
    except (ValueError, TypeError, NotImplementedError, re.error) as error:
        raise UserError(
            f"peft does not give this model such an adapter: {' '.join(str(error).split())[:300]}"
        ) from None
    saved = _saved_modules(model, ",".join(map(re.escape, stored.modules_to_save or [])) or None)
    return LoraPlan(
        config=stored,
        modules=tuple(sorted(tuner.targeted_module_names)),
        parameters=tuple(sorted(set(tuner.targeted_parameter_names))),
        saved=tuple(sorted(saved)),
    )


class _Candidates:
    """What of a model can have an adapter: by name of the module, or of the parameter where it is one."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.owners = dict(model.named_modules())
        routers = set(find_routers(model))
        head = model.get_output_embeddings()
        self.matrices = {
            name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.ndim > 1
        }
        self.linear: set[str] = set()
        self.parameters: set[str] = set()
        self.all: dict[str, str] = {}
        """Its name → that of a parameter in it, for patterns."""
        self._packed: set[str] = set()
        for name, module in self.owners.items():
            in_router = is_inside(name, routers)
            if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)) and not in_router:
                self.all[name] = f"{name}.weight"
                if not isinstance(module, nn.Embedding) and module is not head:
                    self.linear.add(name)
                continue
            for leaf, parameter in module.named_parameters(recurse=False):
                # The kernel of a convolution has three axes too.
                is_packed = parameter.ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd)
                if is_packed or (parameter.ndim == 2 and in_router):
                    own = f"{name}.{leaf}"
                    self.all[own] = own
                    self.parameters.add(own)
                    if is_packed:
                        self._packed.add(own)

    def unnamed(self, wanted: Collection[str], targets: str, within: Callable[[str], bool]) -> list[str]:
        """What `ALL_LINEAR` does not have though its weights are matrices, a line for people."""
        left = {name for name in self._packed.difference(wanted) if within(name)}
        if ALL_LINEAR not in targets or not left:
            return []
        return [f"{grouped(left)}: packed experts, which --lora_target_modules all-linear,experts adds"]


def _bare(config: PretrainedConfig, family: type[PreTrainedModel]) -> PreTrainedModel:
    return bare_model(config, family, dtype=torch.float32)


def _within(layers: str | None, structure: Structure) -> Callable[[str], bool]:
    """Whether a name lies in the layers that are chosen."""
    if layers is None:
        return lambda name: True
    chosen = parse_layers(layers, structure.num_layers, option="--lora_layers")
    prefixes = tuple(f"{structure.layers}.{index}." for index in chosen)
    return lambda name: name.startswith(prefixes)


def _saved_modules(model: PreTrainedModel, given: str | None) -> set[str]:
    """The outermost modules with parameters that `--modules_to_save` names."""
    found: set[str] = set()
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in patterns_of("--modules_to_save", given):
        check_matches("--modules_to_save", pattern, parameters)
        found |= {
            name
            for name, module in model.named_modules()
            if name and any(True for _ in module.parameters()) and _names(pattern, name)
        }
    return {name for name in found if not is_inside(name.rpartition(".")[0], found)}


def _names(pattern: re.Pattern[str], module: str) -> bool:
    """Whether a pattern names this very module, by its last parts."""
    parts = module.split(".")
    return any(pattern.fullmatch(".".join(parts[start:])) for start in range(len(parts)))


def _peft_addresses(model: PreTrainedModel, module: str) -> bool:
    """Whether peft takes a module of this model, and leaves its name as it is when it loads an adapter."""
    asked = LoraConfig(target_modules=[module])
    try:
        LoraModel._check_target_module_compatiblity(None, asked, model, module.rpartition(".")[2])  # type: ignore[arg-type]
        convert_peft_config_for_transformers(asked, model=model, conversions=None)
    except ValueError:
        return False
    return set(asked.target_modules or ()) == {module}


def _name_targets(
    stored: LoraConfig,
    model: PreTrainedModel,
    structure: Structure,
    modules: Collection[str],
    parameters: Collection[str],
) -> None:
    """Name the targets as short as they are exact: leaf names and layers, or every module."""
    names = [name for name, _ in model.named_modules() if name]
    stored.target_modules = sorted({name.rpartition(".")[2] for name in modules})
    stored.target_parameters = _short_parameters(model, structure, parameters) or None
    if {name for name in names if check_target_module_exists(stored, name) is True} == set(modules):
        return
    layers = {int(name[len(structure.layers) + 1 :].split(".")[0]) for name in modules if _in_layers(name, structure)}
    stored.layers_to_transform = sorted(layers)
    stored.layers_pattern = structure.layers.rpartition(".")[2] or None
    if {name for name in names if check_target_module_exists(stored, name) is True} == set(modules):
        return
    stored.layers_to_transform = stored.layers_pattern = None
    stored.target_modules = sorted(modules)


def _in_layers(name: str, structure: Structure) -> bool:
    return bool(structure.layers) and name.startswith(structure.layers + ".")


def _short_parameters(model: PreTrainedModel, structure: Structure, wanted: Collection[str]) -> list[str]:
    """Names of parameters within their layer where these are exact, else whole ones."""
    short = {
        name[len(structure.layers) + 1 :].partition(".")[2] if _in_layers(name, structure) else name for name in wanted
    }
    matched = {name for name, _ in model.named_parameters() if any(name == s or name.endswith("." + s) for s in short)}
    return sorted(short) if matched == set(wanted) else sorted(wanted)


def _short_names(modules: Collection[str], names: Sequence[str]) -> list[str]:
    """Last parts of module names where these name nothing else."""
    short = {name.rpartition(".")[2] for name in modules}
    matched = {name for name in names if name.rpartition(".")[2] in short}
    return sorted(short) if matched == set(modules) else sorted(modules)
