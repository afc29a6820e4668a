"""The kernel has the outputs and gradients of attention with a mask; by Triton's interpreter, in its own process."""

from tests.interpreted import assert_says_equal, needs_triton

CHECK = """
import contextlib
import itertools

import torch
from torch import Tensor

torch.set_num_threads(1)
torch.cuda.device_of = lambda tensor: contextlib.nullcontext()  # there is no device

from jllm.models.kernels import packed_attention
from jllm.models.kernels.packed_attention import Tile, Tiles, attend

SIZE = 16


def with_mask(query, key, value, bounds, scaling, window):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    place = torch.arange(len(query))
    document = torch.bucketize(place, bounds[1:].long(), right=True)
    distance = place[:, None] - place
    seen = (document[:, None] == document) & (distance >= 0) & (distance < (window or len(query)))
    scores = torch.einsum("qhe,khe->hqk", query, key) * (SIZE**-0.5 if scaling is None else scaling)
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, -float("inf")).softmax(-1), value)


def check(function, heads, key_heads, tokens, scaling, window, generator):
    cuts = torch.randint(tokens + 1, (int(torch.randint(6, (), generator=generator)),), generator=generator)
    # Empty documents, also at the end.
    bounds = torch.tensor([0, *cuts.sort().values.tolist(), tokens, tokens], dtype=torch.int32)
    # As attention has them: heads are laid out before tokens, or after them.
    whole = [torch.randn(count, tokens, SIZE, generator=generator) for count in (heads, key_heads)]
    query, key = (each.transpose(0, 1).requires_grad_() for each in whole)
    value = torch.randn(tokens, key_heads, SIZE, generator=generator, requires_grad=True)
    slope = torch.randn(heads, tokens, SIZE, generator=generator).transpose(0, 1)
    found = []
    for way in (function, with_mask):
        output = way(query, key, value, bounds, scaling, window)
        found.append([output, *torch.autograd.grad((output * slope).sum(), (query, key, value))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


generator = torch.Generator().manual_seed(0)
tiles = [
    Tiles(output=Tile(32, 16, 4, 1), queries=Tile(64, 32, 4, 1), keys=Tile(32, 16, 4, 1)),
    Tiles(output=Tile(64, 32, 4, 1), queries=Tile(32, 16, 4, 1), keys=Tile(16, 32, 4, 1)),
]
for cut, (heads, key_heads), window, tokens in itertools.product(
    tiles, [(4, 1), (3, 1), (2, 2), (12, 2)], [None, 1, 7, 40], [1, 53, 96]
):
    packed_attention.TILES = {SIZE: cut}
    check(attend, heads, key_heads, tokens, None if window else 0.4, window, generator)

# What a compiler is told of the kernels is so.
traced = torch.compile(attend, backend="aot_eager_decomp_partition", fullgraph=True)
check(traced, 4, 2, 53, None, None, generator)
print("equal")
"""


@needs_triton
def test_outputs_and_gradients() -> None:
    assert_says_equal(CHECK)
