"""Weights that are not finite, found before anything is trained on them.

One NaN in a folder (a damaged download, a merge that overflowed) makes every loss NaN from the first step on, and
nothing then says where it came from.

Cost: one pass over the weights, without a copy of them; on a GPU a few milliseconds.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from jllm.errors import UserError
from jllm.models.weights.source import pickled_files, weight_files


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], place: str | Path) -> None:
    """Refuse weights with NaN or infinity in them.

    Args:
        tensors: names and values.
        place: where they are from, for the message.

    Raises:
        UserError: the first one is named.
    """
    extremes = [(name, torch.stack(torch.aminmax(tensor.detach()))) for name, tensor in tensors if _is_checked(tensor)]
    for name, ends in extremes:  # looked at only when all are on their way, so that a device is waited for once
        low, high = ends.tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            what = "NaN" if math.isnan(low) or math.isnan(high) else "infinity"
            raise UserError(f"{place}: the tensor {name} holds {what}; download the weights again, or repair them")


def check_stored_weights(folder: str | Path) -> None:
    """Read all weights of a model folder, and refuse what is not finite.

    Raises:
        UserError: the file and the tensor are named, or a file that cannot be read.
    """
    for path in weight_files(folder):
        check_finite(_stored(path), path)
    for path in pickled_files(folder):
        check_finite(torch.load(path, map_location="cpu", mmap=True, weights_only=True).items(), path)


def _stored(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({error}); download it again") from None


def _is_checked(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0 and tensor.device.type != "meta"
