"""Shared rows of a model compute what whole rows compute: loss and every gradient, family by family."""

import os
from pathlib import Path

from tests.distributed.ranks import Ranks
from tests.models.share_check import LIMIT, shared_gradients, worst_of

IN_FULL = float(os.environ.get("JLLM_TEST_SIZE", "1")) > 1
FEW = ("llama", "qwen2", "qwen3", "gemma2", "mixtral", "phi3")
"""In every run; with a larger JLLM_TEST_SIZE all that the check lets pass."""


def families() -> list[str]:
    from jllm.errors import UserError
    from jllm.models.families import catalogue
    from jllm.models.sequence_parallel.checks import check_sequence_parallel
    from jllm.models.weights.source import causal_class
    from tests.models.tiny import tiny_config

    found = []
    for family in catalogue()[1] if IN_FULL else ():
        if family.by_lengths == "none":
            continue
        config = tiny_config(family.model_type)
        try:
            check_sequence_parallel(config, causal_class(config), 2)
        except UserError:
            continue
        found.append(family.model_type)
    return found or list(FEW)


def test_loss_and_gradients(tmp_path: Path) -> None:
    """Packed rows of an odd length, in both modes, of whole models and of stages that are cut inside every layer."""
    from tests.models.family_check import make_folder
    from tests.models.tiny import tiny_config

    names = families()
    folders = [tmp_path / name for name in names]
    for name, folder in zip(names, folders, strict=True):
        make_folder(tiny_config(name, **({"tied": True} if name == "gemma2" else {})), folder)
    answers, *_ = Ranks(2).run(shared_gradients, folders)
    worst = {
        f"{name}, {way}": worst_of(folder, answer)
        for name, folder, by_way in zip(names, folders, answers, strict=True)
        for way, answer in by_way.items()
    }
    assert len(worst) >= 4 * len(FEW)
    assert not {key: value for key, value in worst.items() if isinstance(value, str) or value > LIMIT}
