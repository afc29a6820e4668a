"""A small configuration, and costs of layers made by hand."""

from transformers import LlamaConfig

from jllm.models.pipeline.costs import (
    Costs,
    LayerCost,
    Parameters,
    StateBytes,
)


def config_of(layers: int, vocab: int = 64) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2
    )


def all_of(count: int) -> Parameters:
    return Parameters(total=count, trained=count)


def costs_of(times: list[float], *, head: float = 0.0, activation: float = 1.0, tied: bool = False) -> Costs:
    return Costs(
        layers=tuple(
            LayerCost(kind="Layer", parameters=all_of(int(10 * t)), time=t, activation_bytes=activation * t)
            for t in times
        ),
        embedding_parameters=all_of(7),
        head_parameters=all_of(7),
        embedding_time=0.0,
        head_time=head,
        embedding_activation_bytes=0.0,
        head_activation_bytes=head,
        boundary_bytes=1.0,
        transient_bytes=0.0,
        state=StateBytes(trained=1.0, frozen=0.25),
        operations=0.0,
        tied_parameters=all_of(7 if tied else 0),
        model_parameters=all_of(sum(int(10 * t) for t in times) + (7 if tied else 14)),
    )
