"""`jllm plan`: in which layouts a model can train on so many devices, what each needs, and how fast it should be."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from jllm.errors import UserError, say
from jllm.machine import parse_memory, require_package
from jllm.options import command, option

if TYPE_CHECKING:
    from jllm.train.planning.cluster import Cluster
    from jllm.train.planning.layouts import Estimate, Wanted

GBIT, GB = 1e9 / 8, 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Options of a plan."""

    model: str = option(
        dataclasses.MISSING, "-m", group="Run", help="Hugging Face folder, or a published shape such as llama-3-70b"
    )
    trust_remote_code: bool = option(False, help="run model code that comes with the folder")
    seq_len: int = option(4096, least=1, most=1 << 24, help="tokens of a row")
    global_batch_size: int = option(256, least=1, most=1 << 20, help="rows of a step")
    optimizer: str = option("adamw", choices=("adamw", "adamw_kahan", "sgd"), help="which optimizer")
    lora_dim: int | None = option(
        None, least=1, most=1 << 16, help="LoRA adapters of this rank train, on all linear maps of a frozen model"
    )
    load_in_4bit: bool = option(False, help="the frozen model is held in 4 bits (QLoRA)")
    load_in_8bit: bool = option(False, help="the frozen model is held in 8 bits")
    split_dlayer: bool = option(False, help="stages may be cut between attention and mlp, where they gain by it")
    sequence_sharded_norms: bool = option(False, help="slices share the tokens between attention and mlp")
    gpus: int = option(8, "-n", least=1, most=1 << 16, group="Devices", help="GPUs in all")
    gpus_per_node: int = option(8, least=1, most=1 << 10, help="GPUs that reach each other inside a node")
    gpu: str = option("H100", help="which GPU: its peak is known by name, as in the records of a run")
    gpu_memory: str = option("75G", help="memory of a GPU that a run may fill; some GiB are CUDA's own")
    inside: float = option(400.0, above_least=True, most=10**5, help="GB/s of a GPU to others of its node, each way")
    link: float = option(400.0, above_least=True, most=10**6, help="Gbit/s between two nodes, each way")
    show: int = option(10, least=1, group="Answer", help="so many layouts, the fastest ones")
    json: bool = option(False, help="print them as one JSON object")

    def __post_init__(self) -> None:
        """Refuse what the trainer refuses.

        Raises:
            UserError: options that do not go together.
        """
        load_in = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(self, name)), None)
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("--load_in_4bit and --load_in_8bit exclude each other; give one of them")
        if load_in is not None and self.lora_dim is None:
            raise UserError(
                f"--{load_in}: a quantised model is not trained itself, adapters beside it are; give --lora_dim too,"
                " or drop it"
            )
        if self.sequence_sharded_norms and self.lora_dim is not None:
            raise UserError(
                f"--sequence_sharded_norms with --lora_dim {self.lora_dim}: tokens shared by slices were not shown to"
                " work with it in this version; drop one"
            )


@command(PlanConfig, name="plan")
def main(config: PlanConfig) -> None:
    """Say how to divide GPUs for training a model: stages, pipelines, shared rows, slices."""
    from jllm.train.planning.cluster import PEAK_FLOPS, Cluster, peak_of
    from jllm.train.planning.layouts import left_out, plan

    peak = peak_of(config.gpu)
    if peak is None:
        raise UserError(f"--gpu {config.gpu}: its peak is not known; give one of {', '.join(PEAK_FLOPS)}")
    cluster = Cluster(
        devices=config.gpus,
        devices_per_node=config.gpus_per_node,
        memory=parse_memory("--gpu_memory", config.gpu_memory),
        operations=peak,
        inside=config.inside * GB,
        between=config.link * GBIT,
    )
    wanted = wanted_of(config)
    found, leanest = plan(wanted, cluster)
    if leanest is None:
        raise UserError(
            f"no layout of {config.gpus} GPUs divides {config.global_batch_size} rows a step; give another --gpus or"
            " --global_batch_size"
        )
    if not found:
        raise UserError(
            f"no layout fits {config.gpu_memory} a GPU: the leanest ({flags_of(leanest, config)}) needs"
            f" {leanest.memory / 2**30:.1f} GiB; give more --gpus, GPUs with more memory or a shorter --seq_len"
        )
    reasons = left_out(wanted) if config.gpus > 1 else []
    if config.json:
        shown = [dataclasses.asdict(each) for each in found[: config.show]]
        say(json.dumps({"layouts": shown, "fitting": len(found), "left_out": reasons}, indent=1))
        return
    say("\n".join(table(found[: config.show], cluster)))
    if len(found) > config.show:
        say(f"{len(found) - config.show} more fit; --show {len(found)} for all")
    for reason in reasons:
        say(f"left out: {reason}")
    say(f"the fastest: {flags_of(found[0], config)}")


def wanted_of(config: PlanConfig) -> "Wanted":
    """What a plan is for.

    Raises:
        UserError: the model, or what is asked for beside it, is not there.
    """
    from jllm.models.weights.quantisation import Quantisation, plan_quantisation
    from jllm.models.weights.source import causal_class
    from jllm.train.planning.layouts import Wanted
    from jllm.train.planning.published import model_config

    model = model_config(config.model, trust_remote_code=config.trust_remote_code)
    lora = quantised = None
    if config.lora_dim is not None:
        require_package("peft", "--lora_dim", "adapters")
        from jllm.models.adapters.lora_plan import LoraChoice, plan_lora

        family = causal_class(model)
        lora = plan_lora(model, family, LoraChoice(rank=config.lora_dim, alpha=config.lora_dim))
        if config.load_in_4bit or config.load_in_8bit:
            how = Quantisation(bits=4 if config.load_in_4bit else 8)
            quantised = plan_quantisation(model, family, how, folder=Path(config.model))
    return Wanted(
        config=model,
        length=config.seq_len,
        rows=config.global_batch_size,
        optimizer=config.optimizer,
        lora=lora,
        quantised=quantised,
        split_dlayer=config.split_dlayer,
        sharded_norms=config.sequence_sharded_norms,
    )


def table(found: "list[Estimate]", cluster: "Cluster") -> list[str]:
    """For people: a line for each layout."""
    names = ("stages", "pipelines", "sequence", "slices", "rows", "batches", "recompute", "memory", "bubble")
    rows: list[tuple[str, ...]] = [(*names, "exchange", "MFU", "tokens/s")]
    for each in found:
        layout = each.layout
        sizes = (layout.pipe, layout.data, layout.sequence, layout.tensor, layout.rows, layout.micro_batches)
        shares = (f"{share:.1%}" for share in (each.bubble, each.exchange, each.utilisation))
        memory = f"{each.memory / 2**30:.1f} GiB"
        recompute = "yes" if layout.interval else "no"
        rows.append((*map(str, sizes), recompute, memory, *shares, f"{each.tokens_per_second:,.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{each:>{width}}" for each, width in zip(row, widths, strict=True)) for row in rows]
    return [
        *lines,
        f"estimates for {cluster.devices} GPUs; rows and batches: of a micro-batch, and of a step of each pipeline",
    ]


def flags_of(found: "Estimate", config: PlanConfig) -> str:
    """What the trainer is given for a layout."""
    layout = found.layout
    flags = {
        "pipe_parallel_size": layout.pipe,
        "sequence_parallel_size": layout.sequence,
        "model_parallel_size": layout.tensor,
        "checkpoint_grad_interval": layout.interval,
    }
    given = [f"--{name} {value}" for name, value in flags.items() if value > (name != "checkpoint_grad_interval")]
    given += ["--split_dlayer"] * any(bound % 1 for bound in found.boundaries)
    given += ["--sequence_sharded_norms"] * (config.sequence_sharded_norms and layout.tensor > 1)
    given += [f"--micro_batch_size {layout.rows}", f"--gradient_accumulation_steps {layout.micro_batches}"]
    return " ".join(given)
