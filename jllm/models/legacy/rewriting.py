"""`jllm convert`: an older checkpoint, rewritten as a folder that plain transformers loads without remote code.

Goes some layers at a time, so memory stays at a few GiB whatever the model's size. The folder appears when it is
complete; what a killed run left beside it is removed by the next one.
"""

from pathlib import Path

import torch

from jllm import atomic
from jllm.errors import UserError
from jllm.models.legacy.alibi import AlibiLlamaConfig
from jllm.models.legacy.layouts import LAYOUTS, layout_of
from jllm.models.legacy.reading import read_raw_config
from jllm.models.pipeline.span import spans_of
from jllm.models.pipeline.structure import count_layers
from jllm.models.weights.loading import load_stage
from jllm.models.weights.saving import save_stage, write_companions, write_index
from jllm.models.weights.source import model_info, read_config, weight_files

LAYERS_AT_A_TIME = 4


def convert_checkpoint(source: str | Path, target: str | Path, *, dtype: torch.dtype | None = None) -> str:
    """Write `source` to `target` in the nearest native class; returns that class's name. dtype: the source's.

    Raises:
        UserError: not an older checkpoint, or one without a native class, or `target` is not empty.
    """
    source, target = Path(source), Path(target)
    config = read_config(source, trust_remote_code=None)
    layout = layout_of(read_raw_config(source))
    if layout is None:
        raise UserError(
            f"{str(source)!r} is a {config.model_type!r} model, which transformers loads as it is; only "
            f"{', '.join(LAYOUTS)} checkpoints need converting"
        )
    if isinstance(config, AlibiLlamaConfig):
        raise UserError(
            f"{str(source)!r} uses ALiBi, and transformers has no Llama with it to convert to; give it to the trainer "
            "as it is, which writes it back in its published layout"
        )
    atomic.check_new_folder(target, "--output")
    weight_files(source, advice="download them")
    dtype = dtype or model_info(source).dtype
    layers = count_layers(config)
    boundaries = [*range(0, layers, LAYERS_AT_A_TIME), layers]
    with atomic.new_folder(target) as temporary:
        for span in spans_of(boundaries):
            model = load_stage(source, span, dtype=dtype)
            save_stage(model, span, temporary, dtype=dtype)
        write_companions(model, temporary, dtype=dtype, source=source)
        write_index(temporary)
    return type(model).__name__
