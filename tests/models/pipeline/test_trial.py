"""What is only tried leaves nothing: no random number drawn, no hook that saw its tensors, no count."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from jllm.models.pipeline.trial import is_trial, trial

CPU = torch.device("cpu")


def test_random_numbers_go_on_as_without() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with trial(CPU):
        torch.rand(5)
    assert torch.equal(torch.rand(2), expected)


def test_hooks_around_it_see_nothing() -> None:
    seen: list[torch.Size] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor.shape)
        return tensor

    given = torch.ones(3, requires_grad=True)
    with saved_tensors_hooks(note, note):
        with trial(CPU):
            [gradient] = torch.autograd.grad((given * given).sum(), [given])
        assert not seen
        given * given
    assert torch.equal(gradient, torch.full((3,), 2.0))
    assert seen


def test_one_inside_another() -> None:
    assert not is_trial()
    with trial(CPU):
        with pytest.raises(RuntimeError), trial(CPU):
            raise RuntimeError
        assert is_trial()
    assert not is_trial()
