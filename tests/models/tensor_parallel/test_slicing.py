"""Slices of a model compute what the whole model computes: loss and every gradient, family by family."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from jllm.models.weights.quantisation import Quantisation
from tests.distributed.ranks import Ranks
from tests.models.slice_check import SLICED
from tests.models.tensor_parallel.quantised import Case, values_of

LIMIT = 1e-5
CASES: dict[int, list[tuple[str, dict[str, Any]]]] = {
    2: [
        *((family, {"tied": family == "gemma2"}) for family in SLICED),
        # Latent attention; sinks and experts with biases; activations that train; packed gates; attention that stays
        # whole; the vocabulary alone.
        *((family, {}) for family in ("deepseek_v3", "gpt_oss", "glm4", "olmo2", "gpt2")),
        # Otherwise a value is where its activation has a kink, and rounding decides on which side.
        ("apertus", {"initializer_range": 0.1}),
        # Maps of a layer's own, and an embedding inside another module.
        *((family, {}) for family in ("opt", "modernbert-decoder")),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tied": True}),
    ],
    # Two key and value heads for four ranks, then one; an uneven vocabulary.
    4: [("qwen3", {"vocab_size": 97}), ("qwen2", {"num_key_value_heads": 1})],
}


QUANTISED: dict[int, list[Case]] = {
    2: [
        Case(family="llama", settings={"attention_bias": True, "mlp_bias": True, "tied": True}),
        Case(family="phi3", is_stored=True),
        Case(family="mixtral", settings={"intermediate_size": 128}, targets="q_proj,o_proj"),
        Case(family="qwen2", how=Quantisation(bits=4, kind="fp4", double=False)),
        Case(family="llama", settings={"attention_bias": True, "mlp_bias": True}, how=Quantisation(bits=8)),
        Case(family="llama", how=Quantisation(bits=8), is_stored=True, targets="o_proj"),
    ],
    4: [Case(family="qwen3", settings={"head_dim": 64})],
}
"""Adapters alone have gradients: beside biases that each rank adds a part of, packed maps, experts, shared heads."""
if importlib.util.find_spec("peft") is None or importlib.util.find_spec("bitsandbytes") is None:
    QUANTISED = {2: [], 4: []}


Found = tuple[float, dict[str, tuple[Any, Any]], dict[str, tuple[Any, Any]]]
"""A loss, gradients and what quantised weights stand for, each with what of the whole it is."""


def sliced_gradients(folders: list[Path], size: int) -> list[list[tuple[float, dict[str, tuple[Any, Any]]]]]:
    """One rank's losses, and gradients after the sums that the engine makes, with what of the whole they are; of each
    folder by `CUTS`, where layers may be cut inside."""
    import functools

    import torch
    import torch.distributed as dist

    from jllm.models.families import shown_halves
    from jllm.models.pipeline import head
    from jllm.models.pipeline.carving import published_names
    from jllm.models.tensor_parallel.checks import sharers
    from jllm.models.tensor_parallel.marks import partial_gradient
    from jllm.models.tensor_parallel.slicing import slice_stage
    from jllm.models.weights.source import causal_class, read_config
    from jllm.parallel.mesh import Mesh
    from jllm.parallel.tensor.group import TensorGroup
    from jllm.parallel.tensor.slices import slice_of
    from jllm.train.objectives.cross_entropy import CrossEntropy
    from jllm.train.objectives.objective import ObjectiveInUse
    from tests.models.chain import CUTS, chained_loss_and_gradients, load_chain, packed_batch

    if size == 4:  # several chunks of tokens, each of which is computed again in the backward pass
        head.CHUNK_ELEMENTS = 5 * 25
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    answers = []
    for folder in folders:
        config = read_config(folder)
        group = TensorGroup.make(Mesh(tensor=size), dist.get_rank(), sharers=sharers(config, size))
        by_cut = []
        for boundaries in CUTS if shown_halves(causal_class(config))[0] else CUTS[:1]:
            stages = load_chain(
                folder,
                boundaries,
                in_halves=True,
                objective=ObjectiveInUse(CrossEntropy()),
                cut=functools.partial(slice_stage, group=group),
            )
            loss, gradients = chained_loss_and_gradients(stages, *packed_batch(config.vocab_size))
            found: dict[str, tuple[Any, Any]] = {}
            for stage in stages:
                names = published_names(stage.model, stage.span)
                for name, parameter in stage.model.named_parameters():
                    if (published := names[name]) not in found:
                        gradient = gradients[published]
                        if (handle := partial_gradient(parameter)) is not None:
                            dist.all_reduce(gradient, group=handle)
                        found[published] = (gradient.numpy(), slice_of(parameter))
            by_cut.append((float(loss), found))
        answers.append(by_cut)
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
            for cut, (loss, found) in enumerate(answers[number]):
                assert abs(loss / trained - float(mean)) <= LIMIT
                assert set(found) == set(gradients)
                for name, (gradient, part) in found.items():
                    where = f"{CASES[size][number]}, rank {rank}, cut {cut}, {name}"
                    if (inside := re.match(r".*?\.(?:layers|h)\.\d+\.(.*)", name)) is not None:
                        assert shown_slices(type(whole)).axis(inside[1]) == (part and part.axis), where
                    expected = gradients[name] if part is None else part.of(gradients[name])
                    found_one = torch.from_numpy(gradient) / trained
                    assert (found_one - expected).abs().max() <= LIMIT * max(1.0, float(expected.abs().max())), where


def quantised_gradients(folders: list[Path], size: int) -> list[Found]:
    """What one rank has of each quantised model, gradients after the sums that the engine makes."""
    import torch
    import torch.distributed as dist

    from jllm.models.pipeline.carving import plain_name
    from jllm.models.pipeline.span import spans_of
    from jllm.models.pipeline.stage import PipelineStage
    from jllm.models.tensor_parallel.checks import sharers
    from jllm.models.tensor_parallel.marks import partial_gradient
    from jllm.models.weights.source import read_config
    from jllm.parallel.mesh import Mesh
    from jllm.parallel.tensor.group import TensorGroup
    from jllm.parallel.tensor.slices import slice_of
    from jllm.train.objectives.cross_entropy import CrossEntropy
    from jllm.train.objectives.objective import ObjectiveInUse
    from tests.models.chain import packed_batch

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    [span] = spans_of([0, 4])
    answers = []
    for folder, case in zip(folders, QUANTISED[size], strict=True):
        group = TensorGroup.make(Mesh(tensor=size), dist.get_rank(), sharers=sharers(read_config(folder), size))
        model = case.adapt(case.load(folder, group), group)
        values = {name: (value.numpy(), part) for name, (value, part) in values_of(model).items()}
        loss = PipelineStage(model, span, ObjectiveInUse(CrossEntropy()))(packed_batch(model.config.vocab_size))
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        found = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            assert parameter.grad is not None, name
            if (handle := partial_gradient(parameter)) is not None:
                dist.all_reduce(parameter.grad, group=handle)
            found[plain_name(name)] = (parameter.grad.numpy(), slice_of(parameter))
        answers.append((float(loss.detach()), found, values))
    return answers


@pytest.mark.parametrize("size", [size for size, cases in QUANTISED.items() if cases])
def test_quantised_models(tmp_path: Path, size: int) -> None:
    """Each slice stands for the whole quantised weights, and adapters have the gradients of a plain model of them."""
    import torch

    from jllm.models.pipeline.carving import plain_name
    from tests.models.chain import packed_batch, whole_loss_and_gradients

    folders = [tmp_path / str(number) for number, _ in enumerate(QUANTISED[size])]
    for folder, case in zip(folders, QUANTISED[size], strict=True):
        case.write(folder)
    by_rank = Ranks(size).run(quantised_gradients, folders, size)
    for number, (case, folder) in enumerate(zip(QUANTISED[size], folders, strict=True)):
        whole = case.plain(folder)
        values = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
        case.adapt(whole)
        batch = packed_batch(whole.config.vocab_size)
        mean, gradients = whole_loss_and_gradients(whole, *batch)
        gradients = {plain_name(name): gradient for name, gradient in gradients.items()}
        trained = int((batch[1][0] != -100).sum())
        for rank, answers in enumerate(by_rank):
            loss, found, own_values = answers[number]
            assert abs(loss / trained - float(mean)) <= LIMIT
            assert set(found) == set(gradients)
            assert own_values.keys() == case.plan(folder).parameters
            for name, (value, part) in own_values.items():
                wanted = values[name] if part is None else part.of(values[name])
                assert torch.equal(torch.from_numpy(value), wanted), f"{case}, rank {rank}, {name}"
            for name, (gradient, part) in found.items():
                expected = gradients[name] if part is None else part.of(gradients[name])
                off = (torch.from_numpy(gradient) / trained - expected).abs().max()
                assert off <= LIMIT * max(1.0, float(expected.abs().max())), f"{case}, rank {rank}, {name}"
