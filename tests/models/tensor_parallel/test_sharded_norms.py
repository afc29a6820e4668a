"""`--sequence_sharded_norms`: the loss and every gradient of whole hidden states, of which each slice keeps a part."""

from pathlib import Path

import pytest
import torch

from jllm.models.pipeline.costs import estimate_costs
from tests.distributed.ranks import Ranks
from tests.models.chain import CUTS
from tests.models.family_check import load_whole, make_folder
from tests.models.moved import move_weights
from tests.models.slice_check import show_slices
from tests.models.tiny import tiny_config


@pytest.mark.parametrize(
    ("family", "size"), [("llama", 2), ("gemma2", 2), ("mixtral", 2), ("deepseek_v3", 2), ("qwen3", 4)]
)
@pytest.mark.parametrize("boundaries", CUTS, ids=["one stage", "half layers"])
def test_loss_gradients_and_export(tmp_path: Path, family: str, size: int, boundaries: list[int]) -> None:
    """Of rows whose tokens the slices do not divide; experts and latent attention need all tokens inside."""
    make_folder(tiny_config(family), tmp_path / "whole")
    moved = tmp_path / "moved"
    whole = move_weights(load_whole(tmp_path / "whole"), moved)
    assert show_slices(whole, moved, "layers", size, sharded_norms=True, boundaries=boundaries)


def kept_bytes(folder: Path, sharded_norms: bool) -> int:
    """What one slice keeps of a forward pass for the backward pass."""
    import torch
    import torch.distributed as dist

    from jllm.models.pipeline.span import spans_of
    from jllm.models.pipeline.stage import PipelineStage
    from jllm.models.tensor_parallel.slicing import slice_stage
    from jllm.models.weights.loading import load_stage
    from jllm.parallel.mesh import Mesh
    from jllm.parallel.tensor.group import TensorGroup
    from tests.models.chain import packed_batch

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    [span] = spans_of([0, 4])
    model = load_stage(folder, span, dtype=torch.float32)
    slice_stage(model, TensorGroup.make(Mesh(tensor=2), dist.get_rank()), sharded_norms=sharded_norms)
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    stage = PipelineStage(model, span, lambda hidden, head, fields: hidden.sum())
    batch = packed_batch(96, length=64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stage(batch)
    return sum(kept.values())


def both(folder: Path) -> tuple[int, int]:
    return kept_bytes(folder, False), kept_bytes(folder, True)


def test_less_is_kept(tmp_path: Path) -> None:
    """Of what norms and sums keep, half; and the stage table knows it."""
    config = tiny_config("llama", hidden_size=128, intermediate_size=352)
    make_folder(config, tmp_path / "whole")
    shape = {"sequence_length": 64, "micro_batch_size": 2, "dtype": torch.float32, "slices": 2}
    whole, shared = (
        sum(layer.activation_bytes for layer in estimate_costs(config, **shape, sharded_norms=is_shared).layers)
        for is_shared in (False, True)
    )
    for plain, sharded in Ranks(2).run(both, tmp_path / "whole"):
        assert sharded < 0.85 * plain, (sharded, plain)
        assert shared == pytest.approx(sharded, rel=0.15)
        assert shared / whole == pytest.approx(sharded / plain, rel=0.15)
