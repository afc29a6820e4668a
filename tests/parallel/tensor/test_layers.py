"""Layers with slices of their weights: outputs and gradients of the whole layers."""

from typing import Any

from tests.distributed.ranks import Ranks

VOCABULARY, WIDTH, INSIDE = 11, 6, 5


def model_of() -> Any:
    import torch
    from torch import nn

    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 3

    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embedding": Scaled(VOCABULARY, WIDTH, padding_idx=7),
            "up": nn.Linear(WIDTH, INSIDE),
            "gate": nn.Linear(WIDTH, INSIDE, bias=False),
            "down": nn.Linear(INSIDE, WIDTH),
            "head": nn.Linear(WIDTH, VOCABULARY),
        }
    )


def computed(model: Any) -> Any:
    import torch

    hidden = model["embedding"](torch.tensor([[0, 7, 10], [5, 6, 3]]))
    hidden = hidden + model["down"](model["up"](hidden) * model["gate"](hidden).tanh())
    return model["head"](hidden)


def sliced() -> tuple[Any, dict[str, tuple[Any, Any]], tuple[Any, ...]]:
    import torch.distributed as dist

    from jllm.parallel.mesh import Mesh
    from jllm.parallel.tensor import layers
    from jllm.parallel.tensor.group import SharedCopies, TensorGroup
    from jllm.parallel.tensor.slices import slice_of

    dist.init_process_group("gloo")
    group = TensorGroup.make(Mesh(tensor=2), dist.get_rank())
    model = model_of()
    layers.vocabulary_parallel_embedding(model["embedding"], group)
    copies = SharedCopies(group)
    for name in ("up", "gate"):
        layers.column_parallel(model[name], layers.even(INSIDE, group), copies)
    layers.row_parallel(model["down"], layers.even(INSIDE, group), group)
    layers.vocabulary_parallel_head(model["head"], group)
    logits = computed(model)
    logits.square().sum().backward()
    gradients = {name: (each.grad.numpy(), slice_of(each)) for name, each in model.named_parameters()}
    shard = layers.shard_of(model["head"])
    assert shard is not None
    sizes = (model["embedding"].num_embeddings, model["up"].out_features, model["down"].in_features)
    return logits.detach().numpy(), gradients, (shard.start, shard.stop, model["embedding"].padding_idx, *sizes)


def test_layers_equal_whole_ones() -> None:
    import torch

    model = model_of()
    logits = computed(model)
    logits.square().sum().backward()
    whole = dict(model.named_parameters())
    answers = Ranks(2).run(sliced)
    assert [facts for _, _, facts in answers] == [(0, 6, None, 6, 3, 3), (6, 11, 1, 5, 2, 2)]
    found = torch.cat([torch.from_numpy(mine) for mine, _, _ in answers], -1)
    torch.testing.assert_close(found, logits.detach())
    for _, gradients, _ in answers:
        assert [name for name, (_, part) in gradients.items() if part is None] == ["down.bias"]
        for name, (gradient, part) in gradients.items():
            expected = whole[name].grad
            torch.testing.assert_close(torch.from_numpy(gradient), expected if part is None else part.of(expected))
