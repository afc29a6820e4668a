"""Options of the trainer: how weights change."""

import dataclasses

from jllm.options import option
from jllm.train.limits import MOST_RATE, MOST_STEPS

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
PRECISIONS = ("bf16", "fp16", "fp32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """How weights change."""

    optimizer: str = option("adamw", group="Optimizer", help="which optimizer", choices=("adamw", "sgd"))
    learning_rate: float = option(1e-5, most=MOST_RATE, help="peak learning rate")
    lr_min: float = option(0.0, most=MOST_RATE, help="learning rate that the decay ends at")
    force_constant_lr: float | None = option(
        None, most=MOST_RATE, help="learning rate from here on, whatever the schedule; also for a resumed run"
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
