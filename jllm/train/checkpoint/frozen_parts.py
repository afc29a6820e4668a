"""What a run with adapters goes on from and does not store: the model, how it is held, and an adapter it began with.

Guarantees: a checkpoint's adapters go on beside the weights that they were trained beside, or the run is refused.
Cost: some short reads of each tensor of the model.
"""

from collections.abc import Mapping
from typing import Any

from jllm.errors import UserError
from jllm.models.adapters.adapter_files import read_fields
from jllm.models.weights.digest import weights_digest
from jllm.train.config import TrainConfig
from jllm.train.quantisation import described, quantisation_record

BASE, QUANTISATION, ADAPTER_CONFIG = "base", "quantisation", "adapter_config"


def frozen_parts(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint keeps of them, as JSON values."""
    assert config.model is not None
    base = f"random weights of --seed {config.seed}" if config.init else weights_digest(config.model)
    given = None if config.lora is None else read_fields(config.lora)
    return {BASE: base, QUANTISATION: quantisation_record(config), ADAPTER_CONFIG: given}


def check_same_adapters(saved: Mapping[str, Any], config: TrainConfig) -> None:
    """Compare what the adapters of `--from_ckpt` compute with what this run would make of them: no tensor says by what
    their product is multiplied, nor beside which weights it was trained.

    Raises:
        UserError: the model is another, or a setting of their scale.
    """
    now = frozen_parts(config)
    _check_base(saved, now)
    is_told = saved.get("lora_dim") is not None or saved.get(ADAPTER_CONFIG) is not None
    if config.has_control or not is_told:
        return
    then = _scale(saved, saved.get(ADAPTER_CONFIG))
    given = _scale({name: getattr(config, name) for name in _SCALE_OPTIONS}, now[ADAPTER_CONFIG])
    for name in then:
        if then[name] != given[name]:
            raise UserError(
                f"--from_ckpt: its adapters were trained with {name} {then[name]}, and it would be {given[name]} now;"
                " give the options of that run, or --force_resume"
            )


_SCALE_OPTIONS = ("lora_dim", "lora_alpha", "use_rslora")


def _scale(options: Mapping[str, Any], fields: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the scale of adapters depends on, by options or, with `--lora`, by the configuration of the adapter."""
    if fields is None:
        alpha = options["lora_dim"] if options.get("lora_alpha") is None else options["lora_alpha"]
        fields = {"lora_alpha": alpha, "use_rslora": options.get("use_rslora")}
    return {
        "lora_alpha": fields.get("lora_alpha", 8),
        "use_rslora": bool(fields.get("use_rslora")),
        "rank_pattern": fields.get("rank_pattern") or {},
        "alpha_pattern": fields.get("alpha_pattern") or {},
    }


def check_same_frozen_parts(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare what a checkpoint keeps with that of this run.

    Raises:
        UserError: the model, its quantisation or the adapter of `--lora` is another.
    """
    _check_base(saved, now)
    then, given = saved.get(QUANTISATION), now.get(QUANTISATION)
    if then != given:
        raise UserError(
            f"the model was {described(then)} in the checkpoint's run and is {described(given)} now; give the options"
            " of that run (--load_in_4bit and those beside it), or --force_resume"
        )
    if saved.get(ADAPTER_CONFIG) != now.get(ADAPTER_CONFIG):
        raise UserError("--lora was another adapter in the checkpoint's run; give that one, or --force_resume")


def _check_base(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    # A run without adapters has none, which the option that differs says better.
    if BASE in saved and BASE in now and saved[BASE] != now[BASE]:
        raise UserError(
            "--model has other weights than the model that the checkpoint's adapters were trained on; give that model,"
            " or --force_resume"
        )
