"""What processes find out together: all of them the same, mistakes included."""

from typing import Any

from tests.distributed.ranks import Ranks


def found_together() -> dict[str, Any]:
    """One process's answers."""
    import os

    import torch.distributed as dist

    from jllm.errors import UserError
    from jllm.parallel.collectives import Collectives
    from jllm.parallel.mesh import Mesh

    dist.init_process_group("gloo")
    assert os.environ["LOCAL_RANK"] == os.environ["RANK"]  # one node
    together = Collectives(Mesh(pipe=3))
    rank = together.rank
    asked: list[int] = []

    def find(fact: Any) -> Any:
        asked.append(rank)
        if isinstance(fact, UserError):
            raise fact
        return fact

    answers: dict[str, Any] = {
        "rank": (rank, together.place.pipe),
        "gather": together.gather({"stage": together.place.pipe}),
        "numbers": together.gather_numbers([rank, 10 * rank]).tolist(),
        "total": together.total(rank + 1),
        "first": together.from_first_reader(lambda: find(f"of {rank}")),
        "node": together.ranks_of_node(),
        "first of node": together.gather(together.is_first_of_node),
    }
    try:
        together.from_first_reader(lambda: find(UserError("no such data")))
    except UserError as error:
        answers["mistake"] = str(error)
    together.barrier()
    return {**answers, "asked": asked}


def test_every_process_finds_the_same() -> None:
    answers = Ranks(3).run(found_together)
    assert [answer.pop("rank") for answer in answers] == [(0, 0), (1, 1), (2, 2)]
    # Only the first process looks.
    assert [answer.pop("asked") for answer in answers] == [[0, 0], [], []]
    expected = {
        "gather": [{"stage": 0}, {"stage": 1}, {"stage": 2}],
        "numbers": [[0, 0], [1, 10], [2, 20]],
        "total": 6,
        "first": "of 0",
        "node": [0, 1, 2],
        "first of node": [True, False, False],
        "mistake": "no such data",
    }
    assert answers == [expected] * 3
