"""Whether slices of a family compute what the whole model computes, and what of it can be cut.

Nothing is known of the family: its layers are cut as most families' are, then by transformers' plan alone, then not at
all (embedding and head are), until loss and every gradient are those of the whole model, and the files that the slices
write together hold its weights. All weights are moved away from 0 and 1 before.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from jllm.errors import UserError
from jllm.models.families import BY_PLAN, IN_LAYERS, NOT_SLICED, VOCABULARY, layer_parameter
from jllm.models.sizes import size_of
from jllm.models.tensor_parallel.checks import shared_heads
from tests.distributed.ranks import Ranks
from tests.models.chain import packed_batch, whole_loss_and_gradients
from tests.models.family_check import load_whole, make_folder, takes_packed_rows
from tests.models.half_check import SWITCHES
from tests.models.moved import DiffersError, Limits, difference_of, limits_of, move_weights
from tests.models.tiny import tiny_config

SLICED = ("llama", "qwen2", "qwen3", "gemma2", "mixtral", "phi3")
"""Families that are tried in every layout: plain, biases, norms of heads, tied with soft caps, experts, packed maps."""

FURTHER: dict[str, Any] = {
    "q_lora_rank": None,
    **dict.fromkeys(("qk_layernorm", "use_qk_norm", "qk_norm", "attention_qk_norm"), True),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "qkv_bias", "use_qkv_bias"), True),
    "add_swa_attention_sink_bias": True,
    "first_k_dense_replace": 0,
}
"""What a configuration may say, and layers then have other parameters."""
LENGTH = 23
"""Of rows: no two ranks have equally many of their tokens."""
Found = tuple[list[tuple[float, dict[str, Any]]], list[str]]
"""Of one rank: sums of losses and of gradients with their slices, for each kind of rows; and what is cut how."""


def how_sliced(folder: Path) -> dict[str, Any]:
    """What `Family` says of slices, for the model in `folder`, beside which others are written."""
    moved = folder.with_name("moved")
    whole = move_weights(load_whole(folder), moved)
    why = ""
    for how in (IN_LAYERS, BY_PLAN, VOCABULARY):
        try:
            sliced = show_slices(whole, moved, how, 2)
        except (DiffersError, UserError) as error:
            why = str(error) if how == VOCABULARY else why or str(error)
            continue
        if not any(" " in entry for entry in sliced):  # the plan has nothing for its layers
            how = VOCABULARY
            why = why or "no plan says how its layers are cut"
        is_inside = how != VOCABULARY
        if is_inside:
            sliced = list(dict.fromkeys((*sliced, *_with_switches(whole.config, folder, how))))
        found = {"slices": how, "sliced": tuple(sliced), "not_sliced": why}
        return {
            **found,
            "shares_heads": is_inside and _shares_heads(whole, moved, how),
            "sharded_norms": is_inside and _shards_norms(whole, moved, how),
        }
    nothing = {"sliced": (), "shares_heads": False, "sharded_norms": False}
    return {"slices": NOT_SLICED, "not_sliced": why, **nothing}


def _with_switches(config: PretrainedConfig, folder: Path, how: str) -> list[str]:
    """Parameters of layers that other configurations of the family have, where these are shown too."""
    found: list[str] = []
    for name, value in (SWITCHES | FURTHER).items():
        with contextlib.suppress(Exception):  # there is no such model, or it is not shown
            if getattr(config, name, value) == value:
                continue
            other = folder.with_name(name) / "whole"
            make_folder(tiny_config(config.model_type, **{name: value}), other)
            moved = other.with_name("moved")
            found += show_slices(move_weights(load_whole(other), moved), moved, how, 2)
    return found


def _shares_heads(whole: PreTrainedModel, folder: Path, how: str) -> bool:
    size = 2 * shared_heads(whole.config)
    if size > size_of(whole.config.get_text_config(decoder=True), "num_attention_heads"):
        return False
    try:
        show_slices(whole, folder, how, size)
    except DiffersError:
        return False
    return True


def _shards_norms(whole: PreTrainedModel, folder: Path, how: str) -> bool:
    try:
        show_slices(whole, folder, how, 2, sharded_norms=True)
    except DiffersError:
        return False
    return True


def show_slices(
    whole: PreTrainedModel,
    folder: Path,
    how: str,
    size: int,
    *,
    sharded_norms: bool = False,
    boundaries: list[int] | None = None,
) -> list[str]:
    """Compare so many slices of the model in `folder` with it; which parameters of its layers are cut, and how.

    `boundaries` are of stages, in half layers; None for one stage.

    Raises:
        DiffersError: something is not that of the whole model.
    """
    ways = (False, True) if takes_packed_rows(whole) else (False,)
    target = folder.with_name(f"sliced-{how}-{size}")
    try:
        by_rank: list[Found] = Ranks(size).run(
            sliced_rank, folder, target, how, ways, sharded_norms, boundaries, timeout=60
        )
    except AssertionError as error:  # a rank's exception, or none of its answers
        raise DiffersError(f"they fail in slices ({_last_words(str(error))})") from None
    vocab = whole.config.get_text_config(decoder=True).vocab_size
    for number, packed in enumerate(ways):
        torch.manual_seed(0)
        batch = packed_batch(vocab, length=LENGTH, packed=packed)
        mean, expected = whole_loss_and_gradients(whole, *batch)
        limits: Limits | None = None
        trained = int((batch[1][0] != -100).sum())
        for answers, _ in by_rank:
            loss, gradients = answers[number]
            found, wanted = {}, {}
            for name, (gradient, part) in gradients.items():
                if name in expected:
                    wanted[name] = expected[name] if part is None else part.of(expected[name])
                if name in expected or gradient.any():
                    found[name] = torch.from_numpy(gradient) / trained
            try:
                difference_of((mean, wanted), (torch.tensor(loss / trained), found))
            except DiffersError:
                limits = limits or _limits(folder, expected, batch)
                difference_of((mean, wanted), (torch.tensor(loss / trained), found), limits)
            if absent := expected.keys() - gradients.keys():
                raise DiffersError(f"no slice has {sorted(absent)[0]}")
    stored = load_whole(target).state_dict()
    for name, tensor in whole.state_dict().items():
        if not torch.equal(tensor, stored[name]):
            raise DiffersError(f"{name} is written otherwise")
    return by_rank[0][1]


def _limits(folder: Path, expected: dict[str, torch.Tensor], batch: tuple[torch.Tensor, torch.Tensor]) -> Limits:
    other = load_whole(folder)
    return limits_of(other, expected, lambda: whole_loss_and_gradients(other, *batch)[1])


def _last_words(text: str) -> str:
    """What a rank said of its failure, without what lies around it."""
    return text.partition("\n")[0].partition(": ")[2][:100] or text[:100]


def sliced_rank(
    folder: Path,
    target: Path,
    how: str,
    ways: tuple[bool, ...],
    sharded_norms: bool,
    boundaries: list[int] | None,
) -> Found:
    """One rank."""
    import functools

    import torch.distributed as dist

    from jllm.models.pipeline.carving import published_names, structure_of
    from jllm.models.pipeline.structure import count_layers
    from jllm.models.tensor_parallel.checks import sharers
    from jllm.models.tensor_parallel.marks import partial_gradient
    from jllm.models.tensor_parallel.saving import sliced_files
    from jllm.models.tensor_parallel.slicing import slice_stage
    from jllm.models.weights.saving import write_companions, write_index
    from jllm.models.weights.source import read_config
    from jllm.parallel.mesh import Mesh
    from jllm.parallel.tensor.group import TensorGroup
    from jllm.parallel.tensor.slices import slice_of
    from jllm.train.objectives.cross_entropy import CrossEntropy
    from jllm.train.objectives.objective import ObjectiveInUse
    from tests.models.chain import chained_loss_and_gradients, load_chain

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, size = dist.get_rank(), dist.get_world_size()
    config = read_config(folder)
    group = TensorGroup.make(Mesh(tensor=size), rank, sharers=sharers(config, size))
    stages = load_chain(
        folder,
        boundaries or [0, 2 * count_layers(config)],
        in_halves=True,
        objective=ObjectiveInUse(CrossEntropy()),
        cut=functools.partial(slice_stage, group=group, how=how, sharded_norms=sharded_norms),
    )
    parameters = {}
    for stage in stages:
        names = published_names(stage.model, stage.span)
        parameters.update({names[name]: each for name, each in stage.model.named_parameters()})
    answers, vocab = [], config.get_text_config(decoder=True).vocab_size
    for packed in ways:
        torch.manual_seed(0)
        loss, gradients = chained_loss_and_gradients(stages, *packed_batch(vocab, length=LENGTH, packed=packed))
        found = {}
        for name, parameter in parameters.items():
            gradient = gradients.get(name, torch.zeros_like(parameter))
            if (handle := partial_gradient(parameter)) is not None:
                dist.all_reduce(gradient, group=handle)
            found[name] = (gradient.clone().numpy(), slice_of(parameter))
        answers.append((float(loss), found))
    head = stages[-1].model.get_output_embeddings()
    if head is None or slice_of(head.get_parameter("weight")) is None:
        raise DiffersError("its head is no map to the vocabulary")
    files = [
        file
        for stage in stages
        for file in sliced_files(stage.model, stage.span, dtype=torch.float32, source=None, rank=rank, ranks=size)
    ]
    if rank == 0:
        target.mkdir(exist_ok=True)
        for file in files:
            file.begin(target)
    dist.barrier()
    for file in files:
        file.write(target, is_first=rank == 0)
    dist.barrier()
    if rank == 0:
        write_companions(stages[0].model, target, dtype=torch.float32, source=folder)
        write_index(target)
    prefix = f"{structure_of(stages[0].model).layers}."
    entries = []
    for name, parameter in parameters.items():
        if name.startswith(prefix):
            part = slice_of(parameter)
            inside = name.removeprefix(prefix).partition(".")[2]
            entries.append(layer_parameter(inside, None if part is None else part.axis))
    return answers, list(dict.fromkeys(entries))
