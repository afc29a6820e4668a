"""Options of the trainer: how weights change."""

import dataclasses

from jllm.errors import UserError
from jllm.options import option
from jllm.ranges import named_number
from jllm.train.limits import MOST_RATE, MOST_STEPS

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "rms_ratio")
OPTIMIZERS = ("adamw", "adamw_8bit", "adamw_kahan", "schedule_free", "muon", "sgd")
WITHOUT_MASTERS = ("adamw_8bit", "adamw_kahan", "muon")
"""Those that change the weights themselves, in the type that these have, and need whole ones: no ZeRO."""
PRECISIONS = ("bf16", "fp16", "fp32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """How weights change."""

    optimizer: str = option("adamw", group="Optimizer", help="which optimizer", choices=OPTIMIZERS)
    offload_optimizer: bool = option(
        False,
        help="keep fp32 masters and optimizer states of bf16 weights in host memory, and update them there",
    )
    learning_rate: float = option(1e-5, most=MOST_RATE, help="peak learning rate")
    lr_min: float = option(0.0, most=MOST_RATE, help="learning rate that the decay ends at")
    force_constant_lr: float | None = option(
        None, most=MOST_RATE, help="learning rate from here on, whatever the schedule; also for a resumed run"
    )
    module_learning_rate: tuple[str, ...] = option(
        (),
        metavar="PATTERN=RATE",
        help="peak learning rate of modules that a pattern matches, the first that does; may be given several times",
    )
    lr_scheduler_type: str = option("cosine", help="shape of the decay", choices=SCHEDULES)
    lr_cycles: int = option(1, least=1, most=MOST_STEPS, help="cycles of cosine_with_restarts")
    num_warmup_steps: float = option(
        0.0, most=MOST_STEPS, whole_from_1=True, help="warm-up: steps where at least 1, a share of all steps below 1"
    )
    weight_decay: float = option(0.0, most=MOST_RATE, help="decoupled weight decay of matrices")
    adam_beta1: float = option(0.9, most=1, below_most=True, help="AdamW's beta 1")
    adam_beta2: float = option(0.999, most=1, below_most=True, help="AdamW's beta 2")
    adam_eps: float = option(1e-8, most=1, help="AdamW's epsilon")
    gradient_clipping: float = option(1.0, most=10**9, help="largest global gradient norm; 0 does not clip")
    precision: str = option(
        "bf16", help="bf16 and fp16 keep fp32 master weights; bf16 sums gradients in fp32", choices=PRECISIONS
    )
    deterministic: bool = option(
        False, help="on GPUs, use kernels whose results do not vary: resumed runs are bit-identical, steps are slower"
    )
    on_nan: str = option(
        "stop", help="a loss or gradient that is not finite: stop, or skip the step", choices=("stop", "skip")
    )
    router_aux_loss_coef: float | None = option(
        None,
        most=MOST_RATE,
        help="weight of the mixture-of-experts balance loss; 0 only watches [default: not computed]",
    )


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(OptimizerOptions)}


def module_rates(options: OptimizerOptions) -> list[tuple[str, float]]:
    """`--module_learning_rate` taken apart.

    Raises:
        UserError: no rate, or one that is out of range.
    """
    found = []
    for item in options.module_learning_rate:
        given = named_number(item)
        if given is None or not 0 <= given[1] <= MOST_RATE:
            raise UserError(f"--module_learning_rate {item!r}: give a pattern and a rate, such as embed_tokens=1e-5")
        found.append(given)
    return found


def check_optimizer(options: OptimizerOptions) -> None:
    """Raises:
    UserError: options that say nothing together, or contradict each other.
    """
    if module_rates(options) and not options.learning_rate:
        raise UserError("--module_learning_rate needs a --learning_rate above 0, whose schedule it follows")
    kind, schedule = options.optimizer, options.lr_scheduler_type
    if kind == "schedule_free" and schedule not in ("constant", "constant_with_warmup"):
        raise UserError(
            f"--optimizer schedule_free averages instead of decaying, and --lr_scheduler_type is {schedule}; give"
            " constant_with_warmup, or constant"
        )
    if kind in WITHOUT_MASTERS and options.precision == "fp16":
        raise UserError(f"--optimizer {kind} has no fp32 masters, which --precision fp16 needs; give bf16, or adamw")
    unused = [name for name in ("adam_beta1", "adam_eps") if kind == "sgd"]
    unused += ["adam_beta2"] if kind == "sgd" and schedule != "rms_ratio" else []
    for name in unused:
        if (given := getattr(options, name)) != _DEFAULTS[name]:
            raise UserError(f"--{name} {given:g}: --optimizer sgd has none; drop it, or give another optimizer")
    if options.lr_cycles != 1 and schedule != "cosine_with_restarts":
        raise UserError(
            f"--lr_cycles {options.lr_cycles}: --lr_scheduler_type {schedule} has none; give cosine_with_restarts, or"
            " drop it"
        )
    if schedule == "rms_ratio" and options.num_warmup_steps:
        raise UserError(
            f"--num_warmup_steps {options.num_warmup_steps:g}: --lr_scheduler_type rms_ratio rises by itself; drop it"
        )
