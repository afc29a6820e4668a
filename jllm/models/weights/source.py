"""What a model folder says about itself, without loading a weight.

Reads `config.json` and the headers of the safetensors files (a few KiB each). Every mistake in a folder is one line.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from jllm.errors import UserError, did_you_mean
from jllm.guards import notation, tensors
from jllm.models.config_checks import check_config, check_raw_config
from jllm.models.legacy.alibi import AlibiLlamaConfig, AlibiLlamaForCausalLM
from jllm.models.legacy.layouts import layout_of
from jllm.models.pipeline.structure import count_layers
from jllm.models.positions import learned_positions, rotary_positions
from jllm.models.remote_code import check_no_fetched_code
from jllm.models.weight_index import files_in_index

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# The names that safetensors headers use.
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The floating dtypes of weights, as safetensors calls them."""


_OF_A_CONFIG = (
    *(ValueError, KeyError, TypeError, OSError, AttributeError, IndexError, ArithmeticError, AssertionError),
    *(RecursionError, StrictDataclassError),
)
"""What reading a configuration raises where a field of it is not what it should be."""
ADAPTER_NAME = "adapter_config.json"
_BY_LENGTH = {"dynamic", "longrope"}

_PACKED = re.compile(
    r"(.*\.)?(weight_scale(_inv|_2)?|weight_packed|weight_shape|qweight|qzeros|g_idx|SCB|weight\.(absmax|quant_map"
    r"|nested_absmax|nested_quant_map|quant_state\..*))|.*_scale_inv"
)
"""Names of tensors that hold quantised weights, or say how to read them."""
_OF_BITSANDBYTES = re.compile(
    r"(.*\.)?(SCB|weight_format|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*))"
)
"""Those among them that bitsandbytes writes."""
_BLOCKS = re.compile(r".*_(blocks|scales)")
"""The same of mxfp4, where they are bytes."""
_FEW_BITS = re.compile(r"F[468](_.*)?")
"""Types of elements, in safetensors headers, that nothing trains in."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the trainer asks of a model folder before it starts."""

    model_type: str
    vocab_size: int
    """Rows of the token embedding: ids must be smaller."""
    num_layers: int
    dtype: torch.dtype
    """The dtype that most of the stored weights have; from the configuration where there are no safetensors files."""
    tied: bool
    """Whether the head is the embedding."""
    positions_depend_on_length: bool
    """Whether the length that a row is padded to changes its position embeddings (dynamic and longrope scaling)."""
    learned_positions: int | None = None
    """The longest row that there are learned positions for, padding included; None where rows may have any length."""
    rotary_positions: int | None = None
    """The longest row that a model with rotary positions was made for; None where that is not known."""

    def longest_input(self, wanted: int | None) -> int | None:
        """The longest input that it takes where at most `wanted` tokens are; None: any."""
        known = [each for each in (wanted, self.learned_positions) if each is not None]
        return min(known, default=None)


def read_config(
    folder: str | Path, *, trust_remote_code: bool | None = False, quantised: bool = False
) -> PretrainedConfig:
    """The configuration of a model folder; that of an older published layout in terms of the class it is read into.

    Args:
        trust_remote_code: whether code of the folder may be run; None: it may not, and nobody can allow it.
        quantised: whether weights quantised with bitsandbytes will do. The configuration is that of the model alone.

    Raises:
        UserError: no such folder, no sound config.json, a type that needs the code in the folder and may not run it, an
            implementation that would be fetched, or quantised weights.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"model folder {str(folder)!r} does not exist; give a Hugging Face folder with a config.json")
    if not path.is_file():
        if (folder / ADAPTER_NAME).is_file():
            raise UserError(
                f"model folder {str(folder)!r} holds an adapter ({ADAPTER_NAME}) and no model; give the folder of the"
                " model that it was trained on, and the adapter with --lora"
            )
        raise UserError(f"model folder {str(folder)!r} has no config.json; give a Hugging Face model folder")
    try:
        raw = notation.read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from None
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(model_type, str):
        raise UserError(f"{path} has no model_type; give the config.json that was published with the model")
    check_raw_config(raw, path)
    _check_config_plain(raw, path, may_be_quantised=quantised)
    if not trust_remote_code:
        check_no_fetched_code(raw, path)
    config: PretrainedConfig
    if (layout := layout_of(raw)) is not None:
        try:
            config = layout.read_config(raw)
        except KeyError as error:
            raise UserError(f"{path} of a {layout.name} checkpoint has no {error}; give the published file") from None
        except _OF_A_CONFIG as error:
            raise _unreadable(path, model_type, error) from None
        check_config(config, path)
        return config
    if model_type not in CONFIG_MAPPING and not trust_remote_code:
        may_be = raw.get("auto_map") and trust_remote_code is not None
        has_code = ", or --trust_remote_code to run the code in the folder" if may_be else ""
        raise UserError(
            f"model type {model_type!r} of {path} is not one that the installed transformers knows;"
            f"{did_you_mean(model_type, CONFIG_MAPPING)} give a known type (`jllm models` lists them){has_code}"
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=bool(trust_remote_code)
            )
    except _OF_A_CONFIG as error:
        raise _unreadable(path, model_type, error) from None
    if getattr(config, "quantization_config", None):
        del config.quantization_config
    check_config(config, path)
    return config


def _unreadable(path: Path, model_type: str, error: Exception) -> UserError:
    why = " ".join(str(error).split())[:300] or type(error).__name__
    return UserError(
        f"{path} cannot be read as a {model_type!r} configuration: {why}; give the config.json that was published with"
        " the model"
    )


def bitsandbytes_of(folder: str | Path) -> dict[str, Any] | None:
    """What `config.json` says of weights that bitsandbytes has quantised; None where it does not, or cannot be read."""
    try:
        raw: Any = notation.read_json(Path(folder) / "config.json")
    except (OSError, ValueError, RecursionError):  # said where the configuration is read
        return None
    found = raw.get("quantization_config") if isinstance(raw, dict) else None
    return found if _says_bitsandbytes(found) else None


def _says_bitsandbytes(found: Any) -> bool:
    """Whether a `quantization_config` is one of bitsandbytes, with weights in 4 or 8 bits."""
    if not isinstance(found, dict) or found.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return False
    four, eight = bool(found.get("load_in_4bit")), bool(found.get("load_in_8bit"))
    kind = found.get("bnb_4bit_quant_type", "fp4")
    return four != eight and not found.get("llm_int8_has_fp16_weight") and (eight or kind in ("nf4", "fp4"))


def _check_config_plain(raw: dict[str, Any], path: Path, *, may_be_quantised: bool) -> None:
    """Raises:
    UserError: the configuration, or that of a part of the model, says that the weights are quantised.
    """
    if layout_of(raw) is not None:
        return  # which says it in its own words
    for key in ("quantization_config", "compression_config"):
        if found := raw.get(key):
            is_known = key == "quantization_config" and _says_bitsandbytes(found)
            if not (is_known and may_be_quantised):
                method = found.get("quant_method") if isinstance(found, dict) else None
                raise _quantised(f"{path} says {key}: {method or key.removesuffix('_config')}", is_known=is_known)
    for part in raw.values():
        if isinstance(part, dict):
            _check_config_plain(part, path, may_be_quantised=False)


def _quantised(what: str, *, is_known: bool = False) -> UserError:
    adapters = ", or --lora_dim, to train adapters beside them as they are" if is_known else ""
    return UserError(
        f"{what}; quantised weights cannot be trained on, nor exported as they were: give the folder of the model in"
        f" bf16, fp16 or fp32{adapters}"
    )


def check_plain_weights(folder: str | Path, *, quantised: bool = False) -> None:
    """Refuse a folder without weights, and one whose files hold quantised weights, whatever its configuration says.

    `quantised`: the configuration says that they are by bitsandbytes, and so they have to be.

    Raises:
        UserError: as said.
    """
    files, has_scales = weight_files(folder), False
    for path in files:
        for name, entry in read_header(path).items():
            if quantised and _OF_BITSANDBYTES.fullmatch(name):
                has_scales = True
                continue
            bytes_ = entry["dtype"] == "U8" and _BLOCKS.fullmatch(name)
            if bytes_ or _FEW_BITS.fullmatch(entry["dtype"]) or _PACKED.fullmatch(name):
                raise _quantised(f"{path} holds {name} ({entry['dtype']})")
    if quantised and files and not has_scales:
        raise UserError(
            f"{Path(folder) / 'config.json'} says quantization_config: bitsandbytes, and no file holds scales of"
            " quantised weights; remove quantization_config there, or download the model again"
        )


def weight_of_quantised(name: str) -> str:
    """The weight that a stored tensor belongs to, where it says how to read one that bitsandbytes has quantised."""
    if _OF_BITSANDBYTES.fullmatch(name) is None:
        return name
    return re.sub(r"(^|\.)(SCB|weight_format|weight\..*)$", r"\1weight", name)


def causal_class(
    config: PretrainedConfig, *, folder: str | Path | None = None, trust_remote_code: bool = False
) -> type[PreTrainedModel]:
    """The family's own `...ForCausalLM` class; `folder` is where its code is, if it comes with the model.

    Raises:
        UserError: there is no such class in transformers, and none in the folder that may be run.
    """
    if isinstance(config, AlibiLlamaConfig):
        return AlibiLlamaForCausalLM
    mapping: Any = AutoModelForCausalLM._model_mapping
    if type(config) in mapping:
        found = mapping[type(config)]
        native: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
        return native
    reference = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if trust_remote_code and reference and folder is not None:
        remote: type[PreTrainedModel] = get_class_from_dynamic_module(reference, str(folder), local_files_only=True)
        return remote
    raise UserError(
        f"model type {config.model_type!r} has no causal language model in the installed transformers; "
        "give a decoder (`jllm models` lists them)"
    )


def weight_files(
    folder: str | Path, *, advice: str = "download them, or give --init to start from random weights"
) -> list[Path]:
    """The safetensors files of a model folder, or a `UserError` with `advice` where weights are missing.

    Empty for a folder whose weights are pickled (`pytorch_model.bin`): transformers reads those, whole files at a time.
    """
    folder = Path(folder)
    index = folder / INDEX_NAME
    if index.is_file():
        return files_in_index(index)
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    if any((folder / name).is_file() for name in _PICKLED):
        if (folder / _PICKLED[1]).is_file():
            files_in_index(folder / _PICKLED[1])
        return []
    raise UserError(f"model folder {str(folder)!r} has no weights ({SINGLE_NAME} or {INDEX_NAME}); {advice}")


def pickled_files(folder: str | Path) -> list[Path]:
    """The files of a model folder whose weights are pickled; empty where there are safetensors files."""
    folder = Path(folder)
    if (folder / INDEX_NAME).is_file() or (folder / SINGLE_NAME).is_file():
        return []
    return sorted(path for path in folder.glob("pytorch_model*.bin") if path.is_file())


def read_header(path: str | Path) -> dict[str, dict[str, Any]]:
    """Name → dtype, shape and offsets (`data_offsets`, in bytes) of each tensor in a safetensors file."""
    header = tensors.read_header(path)
    header.pop(tensors.METADATA, None)
    return header


def read_metadata(path: str | Path) -> dict[str, str]:
    """The free-form metadata of a safetensors file."""
    found: dict[str, str] = tensors.read_header(path).get(tensors.METADATA, {})
    return found


def stored_dtypes(folder: str | Path) -> dict[torch.dtype, int]:
    """The floating dtypes of the stored weights, with the bytes that each holds; empty without safetensors files."""
    held: dict[torch.dtype, int] = {}
    for path in weight_files(folder):
        for entry in read_header(path).values():
            if (dtype := FLOATING.get(entry["dtype"])) is not None:
                start, end = entry["data_offsets"]
                held[dtype] = held.get(dtype, 0) + end - start
    return held


def stored_dtype(folder: str | Path) -> torch.dtype | None:
    """The floating dtype that holds most bytes of the stored weights; None without safetensors files."""
    held = stored_dtypes(folder)
    return max(held, key=lambda dtype: held[dtype]) if held else None


def model_info(
    folder: str | Path, *, trust_remote_code: bool = False, with_weights: bool = True, quantised: bool = False
) -> ModelInfo:
    """Sizes and dtype of a model folder. `with_weights=False` is for --init, where only the configuration counts.

    `quantised`: as in `read_config`.
    """
    config = read_config(folder, trust_remote_code=trust_remote_code, quantised=quantised)
    text = config.get_text_config(decoder=True)
    if with_weights:
        check_plain_weights(folder, quantised=quantised and bitsandbytes_of(folder) is not None)
    dtype = stored_dtype(folder) if with_weights else None
    if dtype is None:
        declared = getattr(config, "dtype", None) or getattr(text, "dtype", None)
        dtype = getattr(torch, declared) if isinstance(declared, str) else declared or torch.float32
    rotary = rotary_positions(config)
    return ModelInfo(
        model_type=config.model_type,
        vocab_size=text.vocab_size,
        num_layers=count_layers(config),
        dtype=dtype,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        learned_positions=_learned_positions(config, folder, trust_remote_code) if rotary is None else None,
        rotary_positions=rotary,
        positions_depend_on_length=bool(rotary_by_length(config)),
    )


def _learned_positions(config: PretrainedConfig, folder: str | Path, trust_remote_code: bool) -> int | None:
    family = causal_class(config, folder=folder, trust_remote_code=trust_remote_code)
    return learned_positions(bare_model(config, family, dtype=torch.float32))


def bare_model(config: PretrainedConfig, family: type[PreTrainedModel], *, dtype: torch.dtype) -> PreTrainedModel:
    """A model without memory (meta device), to look at its names and shapes.

    Raises:
        UserError: no model can be built from the configuration.
    """
    try:
        with torch.device("meta"), quiet():
            model: PreTrainedModel = family._from_config(copy.deepcopy(config), dtype=dtype)
    except (*_OF_A_CONFIG, ImportError, RuntimeError) as error:  # some need a package that is not here
        why = " ".join(str(error).split())[:300]
        raise UserError(
            f"config.json: no {family.__name__} can be built from it ({type(error).__name__}: {why}); give the"
            " config.json that was published with the model"
        ) from None
    return model


def rotary_by_length(config: PretrainedConfig) -> set[str]:
    """The kinds of rotary embeddings of a model that depend on the longest position there is."""
    return _rope_types(getattr(config.get_text_config(decoder=True), "rope_parameters", None)) & _BY_LENGTH


def _rope_types(parameters: Any) -> set[str]:
    """The kinds of rotary embeddings in a configuration, of all its kinds of layers."""
    if not isinstance(parameters, dict):
        return set()
    own = {kind for kind in [parameters.get("rope_type")] if isinstance(kind, str)}
    return own.union(*(_rope_types(value) for value in parameters.values()))


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports: what they say is checked here."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
