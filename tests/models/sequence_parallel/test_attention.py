"""Attention of ranks that share rows, through a process group: plain masked attention, forward and every gradient."""

from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.distributed.ranks import Ranks

CASE = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "length": st.integers(3, 23),
        # Key heads that ranks divide, that are repeated for them, that become as many as there are queries.
        "heads": st.sampled_from([(3, 3), (6, 3), (6, 1), (6, 2), (12, 4)]),
        "share": st.sampled_from([0.0, 0.1, 0.5]),
        "apart": st.sampled_from([0, 5]),
        "window": st.none() | st.integers(1, 9),
        "softcap": st.none() | st.just(1.5),
        "has_sinks": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


def differences(cases: list[dict[str, Any]]) -> list[float]:
    """One rank's: of each case and mode how far its results and gradients are from those of whole rows."""
    import torch
    import torch.distributed as dist

    from jllm.models.pipeline.bundle import LABELS, POSITION_IDS, Planes
    from jllm.models.sequence_parallel.attention import shared_attention
    from jllm.models.sequence_parallel.share import MODES, RunPlan, SequenceShare
    from jllm.parallel.mesh import Mesh
    from jllm.parallel.sequence.group import SequenceGroup
    from jllm.parallel.sequence.runs import TokenCost
    from tests.models.sequence_parallel.plain import plain_attention, random_heads, random_positions

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    ranks = dist.get_world_size()
    group = SequenceGroup.make(Mesh(sequence=ranks), dist.get_rank())
    found = []
    for case in cases:
        queries, keys = case["heads"]
        generator = torch.Generator().manual_seed(case["seed"])
        heads = random_heads({**case, "queries": queries, "keys": keys}, generator)
        whole = [each.requires_grad_() for each in heads]
        positions = random_positions(generator, case["batch"], case["length"], case["share"])
        names = {"scaling": 0.7, "softcap": case["softcap"]}
        sinks = {"sinks": whole[3]} if case["has_sinks"] else {}
        expected = plain_attention(*whole[:3], positions, window=case["window"], **sinks, **names).transpose(1, 2)
        weights = torch.randn(expected.shape, generator=generator).double()
        used = whole if case["has_sinks"] else whole[:3]
        plain = torch.autograd.grad((expected * weights).sum(), used)
        for mode in MODES:
            cost = TokenCost(apart=case["apart"])
            share = SequenceShare(plan=RunPlan(mode=mode, ranks=ranks, cost=cost), group=group)
            planes = Planes((LABELS, POSITION_IDS), torch.stack([positions, positions]))
            own_positions = share.own_planes(planes)[POSITION_IDS]
            at = share.plan.bounds(case["length"])[group.rank]
            here = slice(at, at + own_positions.shape[1])
            own = [each[:, :, here].detach().clone().requires_grad_() for each in whole[:3]]
            own_sinks = whole[3].detach().clone().requires_grad_()
            result, _ = shared_attention(
                torch.nn.Module(),
                *own,
                None,
                sliding_window=case["window"],
                s_aux=own_sinks if case["has_sinks"] else None,
                **names,
                **share.arguments(positions),
            )
            used_here = [*own, own_sinks] if case["has_sinks"] else own
            gradients = list(torch.autograd.grad((result * weights[:, here]).sum(), used_here))
            theirs = [each[:, :, here] for each in plain[:3]]
            if case["has_sinks"]:
                dist.all_reduce(gradients[3])
                theirs.append(plain[3])
            pairs = zip([result, *gradients], [expected[:, here], *theirs], strict=True)
            found.append(max(float((one - other).detach().abs().max()) for one, other in pairs))
    return found


# A case that fails is found in its list; to look for a smaller one would start processes each time.
@settings(max_examples=3, phases=[Phase.generate], deadline=None)
@given(cases=st.lists(CASE, min_size=20, max_size=20))
def test_both_modes_are_plain_attention(cases: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(Ranks(3).run(differences, cases)):
        for number, difference in enumerate(found):
            assert difference <= 1e-9, (rank, cases[number // 2], number % 2)
