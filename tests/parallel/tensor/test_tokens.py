"""Tokens shared by slices: cut, joined and summed ones are those of whole rows, forward and backward, uneven too."""

from typing import Any

import pytest

from tests.distributed.ranks import Ranks

WIDTH, ROWS = 5, 2
LENGTHS = (1, 2, 3, 7, 12)


def passed() -> list[dict[str, Any]]:
    """One rank's results and gradients of each way, for all lengths."""
    import torch
    import torch.distributed as dist

    from jllm.parallel.mesh import Mesh
    from jllm.parallel.tensor import tokens
    from jllm.parallel.tensor.group import TensorGroup

    dist.init_process_group("gloo")
    group = TensorGroup.make(Mesh(tensor=dist.get_world_size()), dist.get_rank())
    answers = []
    for length in LENGTHS:
        generator = torch.Generator().manual_seed(length)
        whole = torch.randn(ROWS, length, WIDTH, generator=generator)
        mine = whole * (group.rank + 1)  # a part of a sum
        found: dict[str, Any] = {}
        given = whole.clone().requires_grad_()
        own = tokens.own_tokens(given, group)
        (own * own).sum().backward()
        found["own"] = own.detach(), given.grad
        for is_partial in (False, True):
            part = own.detach().requires_grad_()
            joined = tokens.all_tokens(part, length, group, is_partial=is_partial)
            (joined * (mine if is_partial else whole)).sum().backward()
            found[f"all, {is_partial}"] = joined.detach(), part.grad
        given = mine.clone().requires_grad_()
        summed = tokens.scattered(given, group)
        (summed * own.detach()).sum().backward()
        found["scattered"] = summed.detach(), given.grad
        answers.append({name: tuple(each.numpy() for each in pair) for name, pair in found.items()})
    return answers


@pytest.mark.parametrize("size", [2, 3])
def test_the_numbers_of_whole_rows(size: int) -> None:
    import torch
    from torch.nn.functional import pad

    by_rank = Ranks(size).run(passed)
    factor = sum(range(1, size + 1))
    for number, length in enumerate(LENGTHS):
        whole = torch.randn(ROWS, length, WIDTH, generator=torch.Generator().manual_seed(length))
        parts = pad(whole, (0, 0, 0, -length % size)).chunk(size, 1)
        for rank, answers in enumerate(by_rank):
            mine = parts[rank]
            expected = {
                "own": (mine, 2 * whole),
                "all, False": (whole, mine),
                "all, True": (whole, factor * mine),
                "scattered": (factor * mine, whole),
            }
            for name, pair in expected.items():
                for found, wanted in zip(answers[number][name], pair, strict=True):
                    torch.testing.assert_close(torch.from_numpy(found), wanted, msg=f"{length}, {rank}, {name}")
