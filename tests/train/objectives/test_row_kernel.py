"""The kernel has the losses and gradients of what runs without it; by Triton's interpreter, in a process of its own."""

from tests.interpreted import assert_says_equal, needs_triton

CHECK = """
import contextlib
import torch

torch.set_num_threads(1)
torch.cuda.device_of = lambda tensor: contextlib.nullcontext()  # there is no device

from jllm.models.pipeline import head as heads
from jllm.parallel.tensor.group import TensorGroup
from jllm.parallel.tensor.vocabulary import VocabularyShard
from jllm.train.objectives import logit_rows, row_kernel
from jllm.train.objectives.log_probabilities import document_sums
from jllm.train.options.objective import LOSSES
from tests.train.objectives.product_heads import HEADS, ProductHead, assert_equal, micro_batch, results

row_kernel._BLOCK = 32
plain, kernel = (lambda device: False), (lambda device: True)


def sums(head, hidden, fields):
    # Log-probabilities of documents, and all gradients of them.
    documents = torch.arange(hidden.shape[0])[:, None].expand(hidden.shape[:2])
    given = hidden.clone().requires_grad_()
    for parameter in head.parameters():
        parameter.grad = None
    found = document_sums(given, head, fields["labels"], documents, is_fused=True).logps
    (found * torch.linspace(-1, 1, len(found))).sum().backward()
    return [found.float(), given.grad, *(parameter.grad for parameter in head.parameters())]


def both(make):
    found = []
    for logit_rows.has_kernel in (plain, kernel):
        found.append(make())
    assert_equal(found[1], found[0])


for vocabulary in (1, 31, 32, 50, 96, 100):
    heads.CHUNK_ELEMENTS = 7 * vocabulary
    for more in HEADS:
        head = ProductHead(vocabulary, 8, **more)
        hidden, fields = micro_batch(head)
        for kind in LOSSES if vocabulary in (50, 96) else LOSSES[:1]:
            both(lambda: results(head, hidden, fields, is_fused=True, kind=kind))
            both(lambda: results(head, hidden, fields, is_fused=True, kind=kind, gradient=0.3))
        both(lambda: sums(head, hidden, fields))

# Rows of a part of the vocabulary, of which no other rank has the rest: the targets of some tokens are nowhere.
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
group = TensorGroup(rank=0, size=1, handle=torch.distributed.group.WORLD)
shard = VocabularyShard(start=10, stop=60, whole=100, group=group)
labels = torch.tensor([0, 10, 59, 60, -100, 33])
for of in (logit_rows.RowLoss(kind=kind, gamma=1.5, cap=cap) for kind in LOSSES for cap in (None, 4.0)):
    found, given = [], torch.randn(6, 50)
    for logit_rows.has_kernel in (plain, kernel):
        rows = given.clone()
        factor = torch.linspace(0.5, 1, 6)
        found.append([logit_rows.losses_of(of, rows, labels, factor, has_gradient=True, shard=shard), rows])
    assert_equal(found[1], found[0])

# Rows inside wider ones: nothing beside them changes; without gradients they do not either.
buffer = torch.randn(5, 64)
before, labels = buffer.clone(), torch.tensor([0, 49, -100, 3, 7])
lost, _ = row_kernel.cross_entropies(buffer[:, :50], labels, None, scale=1.0, cap=None)
assert torch.equal(buffer, before)
row_kernel.cross_entropies(buffer[:, :50], labels, torch.ones(()), scale=1.0, cap=None)
assert torch.equal(buffer[:, 50:], before[:, 50:])
assert not buffer[2, :50].any() and lost[2] == 0
# Logits that are not finite are told by a loss that is not.
for bad in (float("nan"), float("inf")):
    rows = before[:, :50].clone()
    rows[1, 33] = bad
    lost, _ = row_kernel.cross_entropies(rows, labels, None, scale=1.0, cap=None)
    assert lost.isfinite().tolist() == [True, False, True, True, True]
print("equal")
"""


@needs_triton
def test_the_kernel_has_the_same_losses_and_gradients() -> None:
    assert_says_equal(CHECK)
