"""Whether processes that share the tokens of rows compute what one with whole rows computes, for one family."""

from pathlib import Path
from typing import Any

from tests.distributed.ranks import Ranks

LIMIT = 1e-5
LENGTH = 29
"""The last documents of rows are longer than windows of 8."""


Answer = tuple[float, dict[str, Any]] | str
"""A sum of losses, and of gradients; of what fails, how."""


def how_shared(folder: Path) -> str:
    """`Family.shared_rows` of the model in `folder`."""
    from jllm.errors import UserError
    from jllm.models.sequence_parallel.checks import check_sequence_parallel
    from jllm.models.weights.source import causal_class, read_config

    config = read_config(folder)
    try:
        check_sequence_parallel(config, causal_class(config), 2)
    except UserError:
        return "no"
    [by_way], *_ = Ranks(2).run(shared_gradients, [folder])
    worst = [worst_of(folder, answer) for answer in by_way.values()]
    return "no" if any(isinstance(each, str) or each > LIMIT for each in worst) else "yes"


def shared_gradients(folders: list[Path]) -> list[dict[str, Answer]]:
    """One rank's of each folder, by mode, and by stages where layers may be cut inside."""
    import torch
    import torch.distributed as dist

    from jllm.models.families import shown_halves
    from jllm.models.sequence_parallel.checks import plan_runs
    from jllm.models.sequence_parallel.share import MODES, SequenceShare
    from jllm.models.weights.source import causal_class, read_config
    from jllm.parallel.mesh import Mesh
    from jllm.parallel.sequence.group import SequenceGroup
    from tests.models.chain import CUTS

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    ranks = dist.get_world_size()
    group = SequenceGroup.make(Mesh(sequence=ranks), dist.get_rank())
    answers: list[dict[str, Answer]] = []
    for folder in folders:
        config = read_config(folder)
        family = causal_class(config)
        found: dict[str, Answer] = {}
        for mode in MODES:
            plan = plan_runs(config, family, ranks, slices=1, mode=mode, by_lengths=False)
            share = SequenceShare(plan=plan, group=group)
            for boundaries in CUTS if shown_halves(family)[0] else CUTS[:1]:
                try:
                    answer: Answer = _summed_gradients(folder, boundaries, share)
                except Exception as error:  # the same on every rank: they compute alike
                    answer = f"{type(error).__name__}: {error}"
                found[f"{mode}, {len(boundaries) - 1} stages"] = answer if dist.get_rank() == 0 else ""
        answers.append(found)
    return answers if dist.get_rank() == 0 else []


def _summed_gradients(folder: Path, boundaries: list[int], share: Any) -> tuple[float, dict[str, Any]]:
    """The sums over all ranks of stages between `boundaries`, in half layers."""
    import torch
    import torch.distributed as dist

    from jllm.models.pipeline.carving import published_names
    from jllm.models.sequence_parallel.attention import NAME
    from jllm.train.objectives.cross_entropy import CrossEntropy
    from jllm.train.objectives.objective import ObjectiveInUse
    from tests.models.chain import chained_loss_and_gradients, load_chain, packed_batch

    stages = load_chain(
        folder,
        boundaries,
        in_halves=True,
        objective=ObjectiveInUse(CrossEntropy()),
        share=share,
        attn_implementation=NAME,
    )
    vocab = stages[0].model.config.get_text_config(decoder=True).vocab_size
    total, own = chained_loss_and_gradients(stages, *packed_batch(vocab, length=LENGTH))
    dist.all_reduce(total)
    gradients = {}
    for stage in stages:
        names = published_names(stage.model, stage.span)
        for name, parameter in stage.model.named_parameters():
            if (published := names[name]) not in gradients:
                gradient = own.get(published, torch.zeros_like(parameter))
                dist.all_reduce(gradient)
                gradients[published] = gradient.numpy()
    return float(total), gradients


def worst_of(folder: Path, answer: Answer) -> float | str:
    """How far the loss or a gradient is from those of whole rows."""
    import torch

    from tests.models.chain import packed_batch, whole_loss_and_gradients, worst_gradient
    from tests.models.family_check import load_whole

    if isinstance(answer, str):
        return answer
    whole = load_whole(folder)
    batch = packed_batch(whole.config.get_text_config(decoder=True).vocab_size, length=LENGTH)
    mean, expected = whole_loss_and_gradients(whole, *batch)
    trained = int((batch[1][0] != -100).sum())
    loss, gradients = answer
    found = {name: torch.from_numpy(each) / trained for name, each in gradients.items()}
    expected = {name: expected.get(name, torch.zeros_like(each)) for name, each in found.items()}
    return max(abs(loss / trained - float(mean)), worst_gradient(expected, found)[0])
