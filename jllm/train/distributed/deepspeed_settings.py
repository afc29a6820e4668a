"""The settings that DeepSpeed gets: what the options say, and what `--ds_config` adds.

DeepSpeed passes over keys that it does not know, and settings that its pipeline does not have. Here a key is known
where DeepSpeed asks for it: it reads the settings once, out of a dictionary that writes down what it is asked. Parts
that are pydantic models name their fields themselves.

Guarantees: what is accepted has been read by DeepSpeed, contradicts no option, and is nothing that a pipeline does not
have. Cost: some milliseconds.
"""

from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError, get_pipeline_config
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import ValidationError

from jllm.errors import UserError, did_you_mean
from jllm.guards import notation
from jllm.train.config import TrainConfig
from jllm.train.distributed import launch
from jllm.train.shape import RunShape

NOT_IN_A_PIPELINE = {
    "activation_checkpointing": "give --checkpoint_grad_interval and the options beside it",
    "aio": "nothing is offloaded to disks",
    "autotuning": "jllm starts the processes",
    "checkpoint": "jllm writes checkpoints of its own",
    "compile": "stages are not compiled by DeepSpeed",
    "curriculum_learning_legacy": "the order of the data is jllm's",
    "data_efficiency": "the order of the data is jllm's",
    "data_types.param_dtype": "give --precision",
    "data_types.buffer_dtype": "give --precision",
    "dataloader_drop_last": "the reader of the data is jllm's",
    "datastates": "jllm writes checkpoints of its own",
    "expert_parallel": "this version has pipeline and data parallelism",
    "gradient_allreduce_op": "the loss is an exact mean over all trained tokens, which this would change",
    "gradient_predivide_factor": "the loss is an exact mean over all trained tokens, which this would change",
    "prescale_gradients": "the loss is an exact mean over all trained tokens, which this would change",
    "hybrid_engine": "that is for inference",
    "managed_gradient_accumulation": "a pipeline accumulates by itself",
    "optimizer": "give --optimizer and the options beside it",
    "scheduler": "give --lr_scheduler_type and the options beside it",
    "sequence_parallel_size": "give --sequence_parallel_size to jllm",
    "tensor_parallel": "give --model_parallel_size to jllm",
    "torch_autocast": "give --precision",
    "use_data_before_expert_parallelism": "this version has pipeline and data parallelism",
    "weight_quantization": "that is for inference",
    "bf16.bf16_master_weights_and_grads": "master weights and the sums of gradients are fp32",
    "bf16.bf16_optimizer_states": "the optimizer's state is fp32",
    "fp16.fp16_master_weights_and_grads": "master weights are fp32",
    "fp16.auto_cast": "weights have the type of --precision",
    "zero_optimization.cpu_offload": "give --offload_optimizer",
    "zero_optimization.cpu_offload_param": "the stages of a pipeline stay on their devices",
    "zero_optimization.cpu_offload_use_pin_memory": "the stages of a pipeline stay on their devices",
    "zero_optimization.offload_optimizer": "give --offload_optimizer",
    "zero_optimization.offload_param": "the stages of a pipeline stay on their devices",
    "zero_optimization.zenflow": "it needs offloaded optimizers, which a pipeline does not have",
    "zero_optimization.elastic_checkpoint": "jllm writes checkpoints of its own",
}
"""Settings of DeepSpeed that a run here does not have, with what there is instead; a dot leads into a part. What turns
one of them off is taken."""
TRAIN_BATCH = "train_batch_size"
_OFF: tuple[Any, ...] = (False, None, "auto", {}, [], 0)
_OLD_NAMES: dict[str, str] = {"bfloat16": "bf16"}


class _Asked(dict[str, Any]):
    """Settings that write down which keys were asked for, in them and in their parts.

    Attributes:
        asked: the keys.
        defaults: what they would be if they were not given, where whoever asked said so.
        is_checked: somebody took all of it, to check it by itself.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__({key: _Asked(item) if isinstance(item, dict) else item for key, item in values.items()})
        self.asked: set[str] = set()
        self.defaults: dict[str, Any] = {}
        self.is_checked = False

    def __copy__(self) -> "_Asked":
        return self

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:  # type: ignore[override]
        self.asked.add(key)
        self.defaults.setdefault(key, default)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:  # with it, `**` takes what `keys` gives
        return iter(self.keys())

    def keys(self) -> Any:
        return _Keys(self)

    def items(self) -> Any:
        self.is_checked = True
        return super().items()


class _Keys:
    """The keys of settings: a look for one of them is a question; to take all is to check them."""

    def __init__(self, settings: _Asked) -> None:
        self._settings = settings

    def __contains__(self, key: object) -> bool:
        return key in self._settings

    def __iter__(self) -> Iterator[str]:
        self._settings.is_checked = True
        return dict.__iter__(self._settings)

    def __len__(self) -> int:
        return dict.__len__(self._settings)


def deepspeed_settings(config: TrainConfig, shape: RunShape) -> dict[str, Any]:
    """The DeepSpeed configuration: what the options say, then `--ds_config`, which may add but not contradict.

    Raises:
        UserError: `--ds_config` cannot be read, or has a key or value that DeepSpeed does not know, that contradicts an
            option, or that a pipeline does not have.
    """
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": shape.micro_batch,
        "gradient_accumulation_steps": shape.accumulation,
        "gradient_clipping": config.gradient_clipping,
        "zero_optimization": {"stage": config.resolved_zero_stage},
        # See `jllm.train.distributed.master_optimizer`.
        "bf16": {"enabled": config.engine_precision == "bf16", "immediate_grad_update": True},
        "fp16": {"enabled": config.engine_precision == "fp16"},
        "pipeline": {"activation_checkpoint_interval": 0, "use_reentrant": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    if config.engine_precision != "fp16":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.ds_config is None:
        return settings
    given = _read(config)
    _check_features(given)
    _check_agreement(given, {**settings, TRAIN_BATCH: shape.global_batch})
    merged = _merged(given, settings)
    _check_by_deepspeed(merged)
    return merged


def _read(config: TrainConfig) -> dict[str, Any]:
    """The file, without what it leaves to us ("auto")."""
    path = config.ds_config
    assert path is not None
    try:
        given = notation.read_json(path)
    except OSError as error:
        raise UserError(f"--ds_config {path}: {error.strerror}; give a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--ds_config {path}: not valid JSON: {error}") from None
    if not isinstance(given, dict):
        raise UserError(
            f"--ds_config {path}: holds a JSON {type(given).__name__}; give an object of DeepSpeed settings"
        )
    renamed: dict[str, Any] = {_OLD_NAMES.get(str(key), str(key)): value for key, value in given.items()}
    return _without_auto(renamed)


def _without_auto(values: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in values.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _check_features(given: dict[str, Any]) -> None:
    for name, instead in NOT_IN_A_PIPELINE.items():
        part, _, key = name.rpartition(".")
        holder = given.get(part) if part else given
        if not isinstance(holder, dict) or key not in holder:
            continue
        value = holder[key]
        if value in _OFF or (isinstance(value, dict) and value.get("enabled", True) is False):
            continue
        raise UserError(f"--ds_config: {name} is not for a pipeline of jllm: {instead}; remove it there")


def _check_agreement(given: dict[str, Any], settings: dict[str, Any], prefix: str = "") -> None:
    for key, value in given.items():
        ours = settings.get(key)
        if isinstance(ours, dict):
            if not isinstance(value, dict):
                raise UserError(f"--ds_config: {prefix}{key} = {value!r}: give an object of settings")
            _check_agreement(value, ours, f"{prefix}{key}.")
        elif key in settings and (value != ours or isinstance(value, bool) != isinstance(ours, bool)):
            raise UserError(
                f"--ds_config: {prefix}{key} = {value!r} contradicts the options ({ours!r}); remove it there"
            )


def _merged(given: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, with what is given beside them."""
    merged = dict(settings)
    for key, value in given.items():
        if key == TRAIN_BATCH:
            continue  # DeepSpeed works it out, from numbers of processes that it does not know yet
        merged[key] = {**value, **settings[key]} if isinstance(settings.get(key), dict) else settings.get(key, value)
    return merged


def _check_by_deepspeed(settings: dict[str, Any]) -> None:
    """Let DeepSpeed read the settings, and refuse what it does not ask for, or does not take."""
    asked = _Asked(settings)
    try:
        with launch.quiet():
            DeepSpeedConfig(asked)
    except ValidationError as error:
        raise _refused(error, settings) from None
    except (DeepSpeedConfigError, AssertionError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--ds_config: DeepSpeed refuses it: {_short(error)}; correct it") from None
    pipeline: _Asked = dict.__getitem__(asked, "pipeline")
    pipeline.asked, pipeline.is_checked = {*get_pipeline_config({}), "use_reentrant"}, False
    pipeline.defaults = get_pipeline_config({})
    _check_keys(asked)


def _check_keys(asked: _Asked, prefix: str = "") -> None:
    for key, value in dict.items(asked):
        if key not in asked.asked and not asked.is_checked:
            raise UserError(
                f"--ds_config: DeepSpeed has no setting {prefix}{key}.{did_you_mean(key, asked.asked)} Correct or"
                " remove it there"
            )
        if isinstance(value, _Asked):
            if value.asked or value.is_checked:
                _check_keys(value, f"{prefix}{key}.")
            continue
        default = asked.defaults.get(key)
        if default is None or value is None or isinstance(default, dict):
            continue
        allowed: tuple[type, ...] = (int, float) if type(default) in (int, float) else (type(default),)
        if not isinstance(value, allowed) or (isinstance(value, bool) and not isinstance(default, bool)):
            raise UserError(
                f"--ds_config: {prefix}{key} = {value!r}: DeepSpeed takes a value like {default!r}; correct it there"
            )


def _refused(error: ValidationError, settings: dict[str, Any]) -> UserError:
    """The first thing that is wrong in a part which is a pydantic model."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    holders = (name for name, part in settings.items() if isinstance(part, dict) and field.split(".")[0] in part)
    name = ".".join(each for each in (next(holders, ""), field) if each) or error.title
    if first["type"] == "extra_forbidden":
        known = [field for model in _models() if model.__name__ == error.title for field in model.model_fields]
        return UserError(
            f"--ds_config: DeepSpeed has no setting {name}.{did_you_mean(field, known)} Correct or remove it there"
        )
    return UserError(f"--ds_config: {name} = {first['input']!r:.80}: {first['msg']}; correct it there")


def _models() -> Iterator[type[DeepSpeedConfigModel]]:
    """Every part of DeepSpeed's settings that is a pydantic model."""
    found = list[type[DeepSpeedConfigModel]](DeepSpeedConfigModel.__subclasses__())
    while found:
        model = found.pop()
        found += model.__subclasses__()
        yield model


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
