"""Models whose tokens cannot be shared are refused by name, and what is shared how is worked out from sizes."""

from typing import Any

import pytest

from jllm.errors import UserError
from jllm.models.sequence_parallel.checks import check_sequence_parallel, plan_runs, token_cost
from jllm.models.weights.source import causal_class
from tests.models.tiny import tiny_config

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        ("mamba", {}, "model type 'mamba' was not shown to look at other tokens through its attention alone"),
        ("opt", {}, "and would silently train on something else; use --pipe_parallel_size or --model_parallel_size"),
        ("lfm2", {"layer_types": ["conv"] * 2 + ["full_attention"] * 2}, "'lfm2' has layers of kind conv"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary embeddings of kind dynamic, which depend on the longest position",
        ),
        ("phi3", {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 32}}, "of kind longrope"),
        ("qwen2", {"attention_dropout": 0.1}, "attention_dropout is 0.1, and processes draw their own"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
    ],
)
def test_what_was_not_shown_is_refused_by_name(family: str, settings: dict[str, Any], says: str) -> None:
    config = tiny_config(family, **settings)
    with pytest.raises(UserError, match=f"--sequence_parallel_size 3: .*{says}") as caught:
        check_sequence_parallel(config, causal_class(config), 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("heads", "size", "slices", "mode", "expected"),
    [
        (4, 2, 1, "auto", "ulysses"),
        (4, 2, 2, "auto", "ulysses"),
        (4, 4, 2, "auto", "balanced"),
        (4, 3, 1, "auto", "balanced"),
        (4, 2, 1, "balanced", "balanced"),
    ],
)
def test_the_mode_follows_from_the_heads(heads: int, size: int, slices: int, mode: str, expected: str) -> None:
    config = tiny_config("llama", num_attention_heads=heads)
    family = causal_class(config)
    assert plan_runs(config, family, size, slices=slices, mode=mode, by_lengths=False).mode == expected
    if mode == "auto" and expected == "balanced":
        with pytest.raises(UserError, match=f"--sequence_parallel_size {size} does not divide the 4 attention heads"):
            plan_runs(config, family, size, slices=slices, mode="ulysses", by_lengths=False)


def test_costs_count_products_in_keys() -> None:
    """By hand: of llama's linear maps, of experts that a token goes to, and the keys in windows."""
    llama = tiny_config("llama")
    # q and o 32 x 32, k and v 32 x 16, three of 32 x 48; a key costs two products of 32.
    assert token_cost(llama).apart == 4 * ((2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) // (2 * 32))
    assert token_cost(llama).windows == ((None, 4),)
    assert dict(token_cost(tiny_config("gemma2")).windows) == {8: 2, None: 2}
    assert token_cost(tiny_config("mistral")).windows == ((8, 4),)
    mixtral = token_cost(tiny_config("mixtral"))
    assert mixtral.apart == 4 * ((2 * 32 * 32 + 2 * 32 * 16 + 2 * 3 * 32 * 48) // (2 * 32))


def test_the_plan_is_printed() -> None:
    config = tiny_config("llama")
    family = causal_class(config)
    [line] = plan_runs(config, family, 2, slices=1, mode="ulysses", by_lengths=False).said(2049)
    assert line.endswith("row (ulysses): of 2,049 tokens 1,024, 1,025; attention under masks")
    [line] = plan_runs(config, family, 2, slices=1, mode="auto", by_lengths=True).said(2049)
    assert line.endswith("attention by the lengths of documents")
    [line] = plan_runs(config, family, 2, slices=1, mode="balanced", by_lengths=False).said(2049)
    assert "row (balanced): of 2,049 tokens 1,416, 633, the slowest with 0.0% more work than the mean;" in line
