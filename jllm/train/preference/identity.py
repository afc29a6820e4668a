"""What reference log-probabilities were made with: the weights, the precision, the kernel of attention.

Guarantees: a reference of other weights, down to one number, is found. Cost: a hash over the files of the model, some
GB a second on several cores, on the first process.
"""

from collections.abc import Mapping
from typing import Any

from jllm.data.dataset.columns import REF_LOGPS
from jllm.errors import UserError
from jllm.models.adapters.adapter_files import WEIGHTS_NAME
from jllm.models.weights.digest import files_sha256, weights_sha256
from jllm.train.config import TrainConfig
from jllm.train.data.open import Data
from jllm.train.distributed.agreement import Agreement

_WAY_OUT = "make them again with --write_ref_logps"


def reference_identity(config: TrainConfig, *, attention: str) -> dict[str, Any]:
    """What the model of these options is, as a manifest has it."""
    assert config.model is not None
    return {
        "model": config.model.resolve().name,
        "weights": weights_sha256(config.model),
        "adapter": None if config.lora is None else files_sha256([config.lora / WEIGHTS_NAME]),
        "precision": precision_of(config),
        "attention": attention,
    }


def precision_of(config: TrainConfig) -> str:
    """`--precision`, and how the weights are held where that is in fewer bits."""
    return config.precision if config.load_in is None else f"{config.precision}, {config.load_in}"


def check_references(
    config: TrainConfig, agreement: Agreement, training: Data, evaluation: Mapping[str, Data], *, attention: str
) -> None:
    """Refuse references of another model, or made in another way, than this run starts from; every process calls it.

    Raises:
        UserError: on every process.
    """
    sets = {"--train_data": training, **{f"--eval_data {name}": data for name, data in evaluation.items()}}
    found = {name: data.facts.reference for name, data in sets.items() if data.facts.reference is not None}
    if not found:
        return

    def check() -> None:
        mine = reference_identity(config, attention=attention)
        for name, reference in found.items():
            _compare(name, reference, mine, config)

    agreement.from_first_reader(check)


def _compare(name: str, reference: Mapping[str, Any], mine: Mapping[str, Any], config: TrainConfig) -> None:
    where = f"{name}: its {REF_LOGPS.name} were made"
    if reference.get("weights") != mine["weights"]:
        raise UserError(
            f"{where} by {reference.get('model')} ({_short(reference, 'weights')}), and --model {config.model} has"
            f" other weights ({_short(mine, 'weights')}); give that model, or {_WAY_OUT}"
        )
    if reference.get("adapter") not in (None, mine["adapter"]):
        raise UserError(
            f"{where} with an adapter ({_short(reference, 'adapter')}) that is not --lora {config.lora}; give that one,"
            f" or {_WAY_OUT}"
        )
    for what, option in (("precision", "--precision"), ("attention", "--attn_implementation")):
        if reference.get(what) != mine[what]:
            raise UserError(
                f"{where} with {option} {reference.get(what)}, and this run has {mine[what]}; give the same, or"
                f" {_WAY_OUT}"
            )


def _short(identity: Mapping[str, Any], key: str) -> str:
    return str(identity.get(key))[:12]
