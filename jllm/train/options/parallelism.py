"""Options of the trainer: the processes, and what each of them has."""

import dataclasses
from pathlib import Path
from typing import Any

from jllm.errors import UserError
from jllm.options import option
from jllm.train.limits import MOST_SECONDS

SLICED_OPTIMIZERS = ("adamw", "adamw_kahan", "schedule_free", "sgd")
"""Those that change every element by itself, and were shown to with slices of tensors."""
SCHEDULES = ("1f1b", OVERLAPPED := "overlapped")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelismOptions:
    """The processes, and what each of them has."""

    pipe_parallel_size: int = option(
        1,
        least=1,
        most=1 << 20,
        group="Parallelism",
        help="pipeline stages; what remains of the processes is data-parallel",
    )
    processes: int | None = option(
        None,
        may_differ=True,
        least=1,
        help="without a launcher: start so many processes on this machine through DeepSpeed's [default: one pipeline]",
    )
    model_parallel_size: int = option(
        1,
        "--tensor_parallel_size",
        least=1,
        most=1 << 20,
        help="processes that share the weights of a stage, each with slices of them (tensor parallelism)",
    )
    sequence_sharded_norms: bool = option(
        False,
        help="slices of a stage share the tokens between attention and mlp: norms and sums there keep a part of each"
        " hidden state; with --model_parallel_size",
    )
    async_tensor_model_parallel_allreduce: bool = option(
        False, help="refused: sums of slices overlap nothing; --sequence_sharded_norms takes its place"
    )
    sequence_parallel_size: int = option(
        1,
        least=1,
        most=64,
        help="processes that share the tokens of each row, for long rows (sequence parallelism)",
    )
    sequence_parallel_mode: str = option(
        "auto",
        choices=("auto", "ulysses", "balanced"),
        help="ulysses: attention over whole rows with some of the heads; balanced: all heads over the keys before a"
        " run's end, runs of equal cost; auto: ulysses where the processes divide the heads",
    )
    column_major_topology: bool = option(
        True, help="consecutive ranks are one pipeline; with no_, the same stage of all pipelines"
    )
    zero_stage: int | None = option(
        None,
        most=3,
        help="0 or 1: whether data-parallel ranks share the optimizer's state [default: 1 for bf16, 0 for fp32]",
    )
    ds_config: Path | None = option(None, help="JSON file of further DeepSpeed settings")
    partition_method: str = option(
        "fast", help='layers to stages: fast, mem, uniform, parameters, profile, type:regex, "9,5" or "0,8,17,26"'
    )
    schedule: str = option(
        "1f1b",
        choices=SCHEDULES,
        help="overlapped: activations and gradients travel while stages compute, for slow links; stages keep up to"
        " twice as many micro-batches",
    )
    split_dlayer: bool = option(
        False, help="stages may be cut between attention and mlp: --partition_method counts half layers"
    )
    emb_partitions: int = option(1, help="parts of embedding and head; more than 1 is refused, with what it would gain")
    timeout: int = option(1800, least=1, most=MOST_SECONDS, help="seconds after which a collective operation gives up")
    join_timeout: int = option(
        600,
        may_differ=True,
        least=1,
        most=MOST_SECONDS,
        help="seconds that processes wait at the start for those of other nodes",
        metavar="SECONDS",
    )


def check_slices(options: Any) -> None:
    """Refuse, by name, what was not shown to work with `--model_parallel_size` above 1.

    Args:
        options: all of a run's.

    Raises:
        UserError: one of them.
    """
    own = {
        f"loss {options.loss} and --fused_loss on": options.is_preference and options.fused_loss == "on",
        "use_dora": options.use_dora,
        "modules_to_save": options.modules_to_save is not None,
        "only_ckpt_lora": options.only_ckpt_lora,
        f"optimizer {options.optimizer}": options.optimizer not in SLICED_OPTIMIZERS,
        "only_ckpt_model": options.only_ckpt_model,
    }
    _refuse(f"--model_parallel_size {options.model_parallel_size}", "slices", own | _not_shown(options))
    if options.sequence_sharded_norms:
        others = {
            f"sequence_parallel_size {options.sequence_parallel_size}": options.sequence_parallel_size > 1,
            f"lora_dim {options.lora_dim}": bool(options.lora_dim),
            "compile on": options.compile == "on",
            "neftune_alpha": options.neftune_alpha is not None,
        }
        _refuse("--sequence_sharded_norms", "tokens shared by slices", others)


def check_sequences(options: Any) -> None:
    """Refuse, by name, what was not shown to work with `--sequence_parallel_size` above 1.

    Args:
        options: all of a run's.

    Raises:
        UserError: one of them.
    """
    size = options.sequence_parallel_size
    given = f"--sequence_parallel_size {size}"
    if options.seq_len is not None and options.seq_len < size:
        raise UserError(f"{given}: rows of --seq_len {options.seq_len} leave nothing for some processes; give less")
    own = {
        f"attn_implementation {options.attn_implementation}": options.attn_implementation != "auto",
        "neftune_alpha": options.neftune_alpha is not None,
    }
    _refuse(given, "shared rows", own | _not_shown(options))


def _not_shown(options: Any) -> dict[str, bool]:
    """What was shown with neither slices nor shared rows, by name, and whether it is asked for."""
    return {
        "lora": options.lora is not None,
        "lora_dropout": options.lora_dropout > 0,
        "lora_compute model": options.lora_compute == "model",
        "control_adapter_rank": bool(options.control_adapter_rank),
        "activation_memory_budget": options.activation_memory_budget < 1,
        f"fp8 {options.fp8}": options.fp8 != "off",
        "precision fp16": options.precision == "fp16",
        "partition_method profile": options.partition_method == "profile",
    }


def _refuse(given: str, what: str, refused: dict[str, bool]) -> None:
    for name, is_given in refused.items():
        if is_given:
            raise UserError(f"{given} with --{name}: {what} were not shown to work with it in this version; drop one")


def check_halves(options: Any) -> None:
    """Refuse, by name, what does not work with `--split_dlayer`.

    Args:
        options: all of a run's.

    Raises:
        UserError: one of them.
    """
    if options.control_adapter_rank:
        raise UserError(
            "--split_dlayer with --control_adapter_rank: its adapters work on what a whole layer adds; drop one"
        )
