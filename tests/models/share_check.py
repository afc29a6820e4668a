"""Whether processes that share the tokens of rows compute what one with whole rows computes, for one family."""

from pathlib import Path
from typing import Any

from tests.distributed.ranks import Ranks

LIMIT = 1e-5
LENGTH = 29
"""The last documents of rows are longer than windows of 8."""


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
    [of_modes], *_ = Ranks(2).run(shared_gradients, [folder])
    worst = [worst_of(folder, answer) for answer in of_modes]
    return "no" if any(isinstance(each, str) or each > LIMIT for each in worst) else "yes"


def shared_gradients(folders: list[Path]) -> list[list[tuple[float, dict[str, Any]] | str]]:
    """One rank's sums of losses and of gradients, for each folder and mode; of what fails, how."""
    import torch
    import torch.distributed as dist

    from jllm.models.pipeline.span import spans_of
    from jllm.models.pipeline.stage import PipelineStage
    from jllm.models.sequence_parallel.attention import NAME
    from jllm.models.sequence_parallel.checks import plan_runs
    from jllm.models.sequence_parallel.share import MODES, SequenceShare
    from jllm.models.weights.loading import load_stage
    from jllm.parallel.mesh import Mesh
    from jllm.parallel.sequence.group import SequenceGroup
    from jllm.train.objectives.cross_entropy import CrossEntropy
    from jllm.train.objectives.objective import ObjectiveInUse
    from tests.models.chain import packed_batch

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    ranks = dist.get_world_size()
    group = SequenceGroup.make(Mesh(sequence=ranks), dist.get_rank())
    [span] = spans_of([0, 4])
    answers: list[list[tuple[float, dict[str, Any]] | str]] = []
    for folder in folders:
        found: list[tuple[float, dict[str, Any]] | str] = []
        for mode in MODES:
            try:
                model = load_stage(folder, span, dtype=torch.float32, attn_implementation=NAME)
                plan = plan_runs(model.config, type(model), ranks, slices=1, mode=mode, by_lengths=False)
                share = SequenceShare(plan=plan, group=group)
                stage = PipelineStage(model, span, ObjectiveInUse(CrossEntropy()), share=share)
                loss = stage(packed_batch(model.config.get_text_config(decoder=True).vocab_size, length=LENGTH))
                assert isinstance(loss, torch.Tensor)
                loss.backward()
            except Exception as error:  # the same on every rank: they compute alike
                found.append(f"{type(error).__name__}: {error}")
                continue
            total = loss.detach()
            dist.all_reduce(total)
            gradients = {}
            for name, parameter in model.named_parameters():
                gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                dist.all_reduce(gradient)
                gradients[name] = gradient.numpy()
            found.append((float(total), gradients))
        answers.append(found)
    return answers if dist.get_rank() == 0 else []


def worst_of(folder: Path, answer: tuple[float, dict[str, Any]] | str) -> float | str:
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
