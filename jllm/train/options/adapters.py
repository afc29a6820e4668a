"""Options of the trainer: what is trained beside a frozen model."""

import dataclasses
from pathlib import Path

from jllm.errors import UserError
from jllm.options import option
from jllm.train.limits import MOST_RATE

INITIAL_VALUES = ("kaiming", "gaussian")
ADAPTER_TYPES = ("fp32", "bf16")
COMPUTE_TYPES = ("auto", "model", "adapter")
MOST_RANK = 1 << 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptersOptions:
    """What is trained beside a frozen model."""

    lora_dim: int | None = option(
        None, least=1, most=MOST_RANK, group="Adapters", help="train LoRA adapters of this rank; the model stays frozen"
    )
    lora: Path | None = option(
        None, metavar="FOLDER", may_differ=True, help="train on from this LoRA adapter, a folder of peft"
    )
    lora_alpha: float | None = option(
        None,
        most=MOST_RATE,
        above_least=True,
        help="an adapter's output is multiplied by this over the rank [default: the rank]",
    )
    lora_dropout: float = option(0.0, most=1, below_most=True, help="dropout of what adapters are given")
    lora_target_modules: str = option(
        "all-linear",
        "--lora_module_name",
        help="modules that get an adapter, by commas: names, regular expressions, or all-linear (all linear maps but"
        " head, routers and packed experts)",
    )
    lora_layers: str | None = option(None, help='of the decoder layers, only these get adapters: "0:7,24:31"')
    lora_init: str = option("kaiming", help="how first matrices are drawn; the second are 0", choices=INITIAL_VALUES)
    use_rslora: bool = option(False, help="divide by the square root of the rank, not by the rank")
    use_dora: bool = option(False, help="train the norms of weights apart from their directions (DoRA)")
    loraplus_lr_ratio: float = option(
        1.0, most=MOST_RATE, above_least=True, help="learning rate of the second matrix over that of the first (LoRA+)"
    )
    modules_to_save: str | None = option(
        None, help="modules that are trained whole beside the adapters and stored with them, by commas: lm_head"
    )
    lora_dtype: str | None = option(
        None,
        help="type of the adapters: fp32, or bf16 with fp32 masters [default: fp32; with --precision fp16 that, with"
        " fp32 masters]",
        choices=ADAPTER_TYPES,
    )
    lora_compute: str = option(
        "auto",
        help="type that adapters multiply in: the model's, as under autocast, or their own, slower on a GPU; auto: the"
        " model's on CUDA; DoRA always has its own",
        choices=COMPUTE_TYPES,
    )
    lora_weight_decay: float = option(
        0.0,
        most=MOST_RATE,
        help="decay of the product BA, not of A and B apart: A -= rate x this x B'BA, B -= rate x this x BAA'; fp32"
        " adapters",
    )
    lora_max_norm: float | None = option(
        None,
        most=MOST_RATE,
        above_least=True,
        help="after each step an adapter whose alpha/r x BA has a larger Frobenius norm is scaled down to it; fp32"
        " adapters",
    )
    control_adapter_rank: int | None = option(
        None,
        least=1,
        most=MOST_RANK,
        help="train control adapters of this rank on every decoder layer; the model stays frozen, and the data say the"
        " class of each token",
    )
    control_adapter_gamma: float = option(
        0.5,
        most=0.5,
        above_least=True,
        help="how far a step draws the directions of a control adapter back to orthonormal ones",
    )
    control_adapter_layers: str | None = option(
        None, help='of the decoder layers, only these get control adapters: "0:7,24:31"'
    )
    control_weight_decay: float = option(
        0.0, most=MOST_RATE, help="decay of the strengths of control adapters, towards no change"
    )
    only_ckpt_lora: bool = option(False, help="checkpoints are folders of the adapters alone; no resume from them")
    only_optimize_lora: bool = option(True, help="train the adapters alone; a model with adapters is always frozen")

    @property
    def has_lora(self) -> bool:
        """Whether LoRA adapters are trained."""
        return self.lora_dim is not None or self.lora is not None

    @property
    def has_control(self) -> bool:
        """Whether control adapters are trained."""
        return bool(self.control_adapter_rank)

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained, and the model is frozen."""
        return self.has_lora or self.has_control


_OF_ANY = ("lora_dtype", "only_ckpt_lora")
"""Options of both kinds of adapters."""


def precision_of_adapters(lora_dtype: str | None, precision: str) -> str:
    """`--lora_dtype`, or what the precision of the model allows."""
    return lora_dtype or ("fp16" if precision == "fp16" else "fp32")


def check_adapters(options: AdaptersOptions) -> None:
    """Raises:
    UserError: options of adapters without adapters, or such as exclude each other.
    """
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(AdaptersOptions)
        if getattr(options, field.name) != field.default
        and field.name not in ("lora_dim", "lora", "control_adapter_rank", "only_optimize_lora")
    }
    if not options.only_optimize_lora:
        raise UserError(
            "--no_only_optimize_lora: adapters are trained on a frozen model; give --modules_to_save for what is to"
            " train beside them, or train the model itself without --lora_dim"
        )
    if options.has_lora and options.has_control:
        raise UserError(
            f"--control_adapter_rank {options.control_adapter_rank} and LoRA adapters: a run trains one kind; drop one"
        )
    for name in given:
        if name.startswith("control_") and not options.has_control:
            raise UserError(f"--{name} is an option of control adapters; give --control_adapter_rank too, or drop it")
        if not name.startswith("control_") and not options.has_lora and not (options.has_control and name in _OF_ANY):
            raise UserError(f"--{name} is an option of LoRA adapters; give --lora_dim or --lora too, or drop it")
    if options.lora is not None:
        fixed = ("lora_alpha", "lora_target_modules", "lora_layers", "lora_init", "use_rslora", "use_dora")
        for name in ("lora_dim", *fixed, "modules_to_save", "lora_dropout"):
            if name in given or (name == "lora_dim" and options.lora_dim is not None):
                raise UserError(f"--{name} and --lora: what the adapter {options.lora} is stays as it is; drop one")
