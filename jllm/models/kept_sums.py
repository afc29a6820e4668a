"""What compiled layers keep for the backward pass: the sum that follows a product, and not the product.

A layer adds what it made to what it was given, and its norm reads the sum. In the backward pass the compiler would
make the sum again, and keeps the product for it: so every operation there reads two tensors in place of one, and those
that read the same ones are written into one, whether that spares memory or not. Where the product is read by nothing
else, the sum takes its place: as much memory, fewer reads.

Guarantees: what is computed stays the same. Cost: some microseconds a graph.
"""

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

_ATEN = torch.ops.aten
_VIEWS = (_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.reshape.default)
_PRODUCTS = (_ATEN.mm.default, _ATEN.addmm.default)


class KeptSums(CustomGraphPass):
    """A pass over the graph of forward and backward pass, before it is cut into the two."""

    def __call__(self, graph: fx.Graph) -> None:
        """Mark the sums."""
        for node in graph.nodes:
            if _is_read_again(node) and any(_is_product_of_its_own(each) for each in node.args[:2]):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> Any:
        """Graphs that are cached belong to this text."""
        return get_hash_for_files((__file__,))


def _is_read_again(node: fx.Node) -> bool:
    """Whether it is a sum of the forward pass that several operations read."""
    is_backward = node.meta.get("partitioner_tag") == "is_backward"
    return node.target is _ATEN.add.Tensor and len(node.users) > 1 and not is_backward


def _is_product_of_its_own(value: Any) -> bool:
    """Whether nothing but the sum reads it."""
    while isinstance(value, fx.Node) and value.target in _VIEWS and len(value.users) == 1:
        value = value.args[0]
    return isinstance(value, fx.Node) and value.target in _PRODUCTS and len(value.users) == 1
