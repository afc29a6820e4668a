"""What the processes of a run must have in common, as each of them sees it before they meet.

Options by what they mean, not by how they are written; code, libraries, devices and the environment that changes
arithmetic; the model's configuration and weights. Data are compared by their readers (`jllm.train.data.open`).
Options that `may_differ` are left out.

Cost: milliseconds; on runs of several nodes, some short reads of each tensor of the model, once on each node.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jllm
from jllm.errors import UserError
from jllm.guards import notation
from jllm.models.adapters.adapter_files import CONFIG_NAME, WEIGHTS_NAME, read_fields
from jllm.models.weights.digest import files_digest, weights_digest
from jllm.parallel.meeting import Facts, has_several_nodes
from jllm.train.config import TrainConfig, named_folders, parse_epochs, skipped_steps, weighted_folders
from jllm.train.distributed import launch
from jllm.train.options.optimizer import module_rates
from jllm.train.shape import RunShape

LIBRARIES = ("torch", "deepspeed", "transformers")
OF_QUANTISED = ("bitsandbytes",)
OF_FP8 = ("torchao",)
ENVIRONMENT = (
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "CUDNN_DETERMINISTIC"),
    *("NCCL_ALGO", "NCCL_PROTO", "ATEN_CPU_CAPABILITY", "MKL_CBWR", "DNNL_DEFAULT_FPMATH_MODE"),
    *("ONEDNN_DEFAULT_FPMATH_MODE", "TORCHINDUCTOR_MAX_AUTOTUNE", "TORCH_BLAS_PREFER_CUBLASLT"),
)
"""Variables that change what is computed, or in which order numbers are added."""
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")


def join_alike(config: TrainConfig, shape: RunShape) -> None:
    """Join the run's processes, which all have these facts in common with this one.

    Raises:
        UserError: as `launch.join`.
    """
    launch.join(
        config.timeout,
        deterministic=config.deterministic,
        facts=lambda: facts_of(config, shape),
        join_timeout=config.join_timeout,
    )


def facts_of(config: TrainConfig, shape: RunShape) -> Facts:
    """What this process has to have in common with all others.

    Raises:
        UserError: the model's weights cannot be read.
    """
    facts: Facts = {**_options(config, shape), "the number of processes": shape.mesh.world_size}
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return facts  # the rest is the node's
    assert config.model is not None
    facts |= {
        "jllm": f"{jllm.__version__} (code {_code()})",
        "Python": platform.python_version(),
        "the library": {name: _version(name) for name in _libraries(config)},
        "the device": _device(),
        "the environment variable": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "config.json": _read_json(config.model / "config.json"),
    }
    if has_several_nodes() and config.reads_weights:
        facts["weights (hash) of"] = weights_digest(config.model)
    if config.lora is not None:
        facts |= _adapter(config.lora)
    return facts


def _adapter(folder: Path) -> Facts:
    if not (folder / WEIGHTS_NAME).is_file():
        return {}  # which is refused, with its reason, where it is read
    return {
        CONFIG_NAME: read_fields(folder),
        "adapter (hash) of": files_digest([folder / WEIGHTS_NAME]),
    }


def _options(config: TrainConfig, shape: RunShape) -> Facts:
    resolved = {
        "gradient_accumulation_steps": shape.accumulation,
        "global_batch_size": None,  # follows from the others
        "zero_stage": config.resolved_zero_stage,
        "log_dir": config.resolved_log_dir,
        "train_data": [[str(each.folder), each.weight] for each in weighted_folders(config)],
        "eval_data": {name: str(folder) for name, folder in named_folders(config.eval_data).items()},
        "module_learning_rate": module_rates(config),
        "time_limit": config.time_limit_seconds,
        "skip_train_steps": sorted(skipped_steps(config)),
        "ckpt_epoch": sorted(parse_epochs(config.ckpt_epoch, "--ckpt_epoch")),
        "skip_epoch": sorted(parse_epochs(config.skip_epoch, "--skip_epoch")),
        "ds_config": None if config.ds_config is None else notation.loads(config.ds_config.read_text()),
    }
    facts: Facts = {}
    for field in dataclasses.fields(config):
        if not field.metadata["option"].may_differ:
            value = resolved.get(field.name, getattr(config, field.name))
            if isinstance(value, float) and not math.isfinite(value):
                value = str(value)
            facts[f"--{field.name}"] = json.loads(json.dumps(value, default=str))
    return facts


def _code() -> str:
    """A hash of the package's source."""
    found = hashlib.sha256()
    root = Path(jllm.__file__).parent
    for path in sorted(root.rglob("*.py")):
        found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def _libraries(config: TrainConfig) -> tuple[str, ...]:
    return (*LIBRARIES, *(OF_QUANTISED if config.load_in else ()), *(OF_FP8 if config.fp8 != "off" else ()))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device() -> str:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cuda":
        return str(accelerator.device_name())
    import torch

    return torch.cuda.get_device_name(int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.cuda.device_count()))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = notation.read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from None
    return {key: value for key, value in found.items() if key not in _NOT_OF_THE_MODEL}
