"""Slices of a model compute what the whole model computes: loss and every gradient, family by family."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import Ranks
from tests.models.slice_check import SLICED

LIMIT = 1e-5
CASES: dict[int, list[tuple[str, dict[str, Any]]]] = {
    2: [
        *((family, {"tied": family == "gemma2"}) for family in SLICED),
        # Latent attention; sinks and experts with biases; activations that train; packed gates; attention that stays
        # whole; the vocabulary alone.
        *((family, {}) for family in ("deepseek_v3", "gpt_oss", "apertus", "glm4", "olmo2", "gpt2")),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tied": True}),
    ],
    # Two key and value heads for four ranks, then one; an uneven vocabulary.
    4: [("qwen3", {"vocab_size": 97}), ("qwen2", {"num_key_value_heads": 1})],
}


def sliced_gradients(folders: list[Path], size: int) -> list[tuple[float, dict[str, tuple[Any, Any]]]]:
    """One rank's losses, and gradients after the sums that the engine makes, with what of the whole they are."""
    import torch
    import torch.distributed as dist

    from jllm.models.pipeline import head
    from jllm.models.pipeline.span import spans_of
    from jllm.models.pipeline.stage import PipelineStage
    from jllm.models.tensor_parallel.checks import sharers
    from jllm.models.tensor_parallel.marks import partial_gradient
    from jllm.models.tensor_parallel.slicing import slice_stage
    from jllm.models.weights.loading import load_stage
    from jllm.parallel.mesh import Mesh
    from jllm.parallel.tensor.group import TensorGroup
    from jllm.parallel.tensor.slices import slice_of
    from jllm.train.objectives.cross_entropy import CrossEntropy
    from jllm.train.objectives.objective import ObjectiveInUse
    from tests.models.chain import packed_batch

    if size == 4:  # several chunks of tokens, each of which is computed again in the backward pass
        head.CHUNK_ELEMENTS = 5 * 25
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    [span] = spans_of([0, 4])
    answers = []
    for folder in folders:
        model = load_stage(folder, span, dtype=torch.float32)
        group = TensorGroup.make(Mesh(tensor=size), dist.get_rank(), sharers=sharers(model.config, size))
        slice_stage(model, group)
        stage = PipelineStage(model, span, ObjectiveInUse(CrossEntropy()))
        loss = stage(packed_batch(model.config.vocab_size))
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        found = {}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            if (handle := partial_gradient(parameter)) is not None:
                dist.all_reduce(parameter.grad, group=handle)
            found[name] = (parameter.grad.numpy(), slice_of(parameter))
        answers.append((float(loss.detach()), found))
    return answers


@pytest.mark.parametrize("size", CASES)
def test_loss_and_gradients(tmp_path: Path, size: int) -> None:
    import torch

    from jllm.models.families import shown_slices
    from tests.models.chain import packed_batch, whole_loss_and_gradients
    from tests.models.family_check import load_whole, make_folder
    from tests.models.tiny import tiny_config

    folders = [tmp_path / str(number) for number, _ in enumerate(CASES[size])]
    for folder, (family, settings) in zip(folders, CASES[size], strict=True):
        make_folder(tiny_config(family, **settings), folder)
    by_rank = Ranks(size).run(sliced_gradients, folders, size)
    for number, folder in enumerate(folders):
        whole = load_whole(folder)
        batch = packed_batch(whole.config.vocab_size)
        mean, gradients = whole_loss_and_gradients(whole, *batch)
        trained = int((batch[1][0] != -100).sum())
        for rank, answers in enumerate(by_rank):
            loss, found = answers[number]
            assert abs(loss / trained - float(mean)) <= LIMIT
            assert set(found) == set(gradients)
            for name, (gradient, part) in found.items():
                where = f"{CASES[size][number]}, rank {rank}, {name}"
                if (inside := re.match(r".*?\.(?:layers|h)\.\d+\.(.*)", name)) is not None:
                    assert shown_slices(type(whole)).axis(inside[1]) == (part and part.axis), where
                expected = gradients[name] if part is None else part.of(gradients[name])
                found_one = torch.from_numpy(gradient) / trained
                assert (found_one - expected).abs().max() <= LIMIT * max(1.0, float(expected.abs().max())), where
