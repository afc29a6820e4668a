"""What passes between slices: sums in one direction, copies in the other."""

from typing import Any

from tests.distributed.ranks import Ranks


def passed() -> dict[str, Any]:
    """What one of four ranks gets, and its gradients."""
    import torch
    import torch.distributed as dist

    from jllm.parallel.alone import alone
    from jllm.parallel.mesh import Mesh
    from jllm.parallel.tensor.group import SharedCopies, TensorGroup, copied, summed

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    group = TensorGroup.make(Mesh(tensor=4), rank, sharers=2)
    shared = torch.tensor([float(rank)])
    dist.all_reduce(shared, group=group.sharing)
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    result = summed(copied(value, group) * (rank + 1), group)
    result.sum().backward()
    copies, other = SharedCopies(group), torch.ones(1)
    copies.takers = 2
    one, two = copies(value), copies(value)
    three, four = copies(value), copies(other)
    own = None
    if rank == 2:  # which waits for nobody
        with alone():
            own = summed(torch.ones(2), group).tolist()
    return {
        "alone": own,
        "place": (group.rank, group.size, group.sharers),
        "shared": shared.tolist(),
        "sum": result.tolist(),
        "gradient": value.grad.tolist() if value.grad is not None else None,
        "copies": (one is two, two is three, four.tolist(), copies._known is None),
        "kept": copies(other) is four and copies._known is None,
    }


def test_sums_and_copies() -> None:
    answers = Ranks(4).run(passed)
    for rank, answer in enumerate(answers):
        assert answer["place"] == (rank, 4, 2)
        assert answer["shared"] == [1.0 if rank < 2 else 5.0]
        assert answer["sum"] == [10.0, 20.0]
        assert answer["gradient"] == [10.0, 10.0]
        # The second taker has the first one's copy; nothing is kept after it.
        assert answer["copies"] == (True, False, [1.0], False)
        assert answer["kept"]
        assert answer["alone"] == ([1.0, 1.0] if rank == 2 else None)
