"""How the parts of a family's decoder layers are cut: by transformers' plan, and tables of ours where it says nothing.

A plan names a style for a module or a parameter. None is believed: `Family.slices` says which families were shown to
train the same by which tables, by every gradient.

Styles are transformers' own names, and three of ours: `packed_qkv`, queries, keys and values behind one another;
`paired_rowwise`, pairs of neighbours along the last axis that stay together; and `added_once`, whole and added by the
ranks together.
"""

import re
from collections.abc import Mapping

from transformers import PretrainedConfig, PreTrainedModel

from jllm.models.pipeline.carving import structure_of

COLUMNS, ROWS = "colwise", "rowwise"
PACKED_COLUMNS, PACKED_ROWS, PACKED_QKV = "packed_colwise", "packed_rowwise", "packed_qkv"
PAIRED_ROWS, ADDED_ONCE = "paired_rowwise", "added_once"
PARTIAL = "replicated_with_grad_allreduce"
EXPERTS, LATENT, LOCAL = "moe_tp_experts", "mla_kv_a_proj", "local_params"
GATHERED, SPLIT = "colwise_gather_output", "rowwise_split_input"
"""Results that all ranks have again at once: nobody gains from the cut, so what is next to one of them stays whole."""

_FUSED = {"qkv_proj": PACKED_QKV, "gate_up_proj": PACKED_COLUMNS}
"""Linear maps that hold several behind one another, which transformers gathers; what follows each takes slices."""
_ATTENTION = ("self_attn", "attn", "attention")
_USUAL = {
    **{
        f"{attention}.{name}_proj": COLUMNS
        for attention in _ATTENTION
        for name in ("q", "k", "v", "q_b", "kv_b", "gate", "g")
    },
    **{f"{attention}.{name}": ROWS for attention in _ATTENTION for name in ("o_proj", "out_proj")},
    **{
        f"self_attn.{name}": PARTIAL
        for side in ("q", "k", "query", "key")
        for name in (f"{side}_norm", f"{side}_layernorm")
    },
    "self_attn.kv_a_proj_with_mqa": LATENT,
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), COLUMNS),
    "mlp.down_proj": ROWS,
    **dict.fromkeys(("mlp.fc1", "mlp.c_fc", "mlp.fc_in", "mlp.dense_h_to_4h", "fc1"), COLUMNS),
    **dict.fromkeys(("mlp.fc2", "mlp.c_proj", "mlp.fc_out", "mlp.dense_4h_to_h", "fc2"), ROWS),
    # Those that come from BERT.
    **{f"attention.self.{name}": COLUMNS for name in ("query", "key", "value")},
    **dict.fromkeys(("attention.output.dense", "output.dense"), ROWS),
    "intermediate.dense": COLUMNS,
}
"""What many families call the parts of layers. Where transformers' plan speaks of a module, it alone counts."""
_OWN: dict[str, dict[str, str]] = {
    "apertus": {"mlp.act_fn": PARTIAL},
    "gpt_oss": {
        "self_attn.sinks": COLUMNS,
        "mlp.experts": EXPERTS,
        "mlp.experts.gate_up_proj": PAIRED_ROWS,
        "mlp.experts.gate_up_proj_bias": PAIRED_ROWS,
        "mlp.experts.down_proj": COLUMNS,
        "mlp.experts.down_proj_bias": ADDED_ONCE,
    },
}
"""What a family has besides, by model type."""


class SlicingPlan:
    """The styles of one model.

    Args:
        model: whole, or a stage.
        with_usual: whether what transformers says nothing of is cut as in most families.
    """

    def __init__(self, model: PreTrainedModel, *, with_usual: bool) -> None:
        self._layers = structure_of(model).layers
        self._theirs = _compiled(dict(model.tp_plan))
        inside = f"{self._layers}.*."
        own = _OWN.get(model.config.get_text_config(decoder=True).model_type, {}) if with_usual else {}
        self._own = _compiled({inside + name: style for name, style in own.items()})
        self._usual = _compiled({inside + name: style for name, style in _USUAL.items()} if with_usual else {})
        known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
        spoken = {name: style for name in known if self._is_inside(name) and (style := self._of_theirs(name))}
        self._parents = {_parent(name) for name in spoken}
        self._heads_cut = {_parent(name) for name in known if _first(self._usual, name) == COLUMNS}
        self._whole = {
            _parent(name)
            for name, style in spoken.items()
            if style in (GATHERED, SPLIT) and not self._fused_beside(name, known)
        }

    def style(self, name: str) -> str | None:
        """How a module or a parameter is cut; None for what is whole."""
        if not self._is_inside(name) or _parent(name) in self._whole:
            return None
        leaf = name.rpartition(".")[2]
        if (own := _first(self._own, name)) is not None:
            return own
        theirs = self._of_theirs(name)
        if theirs is None:
            usual = None if _parent(name) in self._parents else _first(self._usual, name)
            return usual if usual != PARTIAL or _parent(name) in self._heads_cut else None
        return _FUSED.get(leaf, COLUMNS) if theirs == GATHERED else ROWS if theirs == SPLIT else theirs

    def _of_theirs(self, name: str) -> str | None:
        return _first(self._theirs, name)

    def _is_inside(self, name: str) -> bool:
        return bool(self._layers) and name.startswith(f"{self._layers}.")

    def _fused_beside(self, name: str, known: set[str]) -> bool:
        return any(f"{_parent(name)}.{leaf}" in known for leaf in _FUSED)


def has_packed_qkv(config: PretrainedConfig) -> bool:
    """Whether a family's queries, keys and values are one map, by its plan."""
    plan: Mapping[str, str] = getattr(config.get_text_config(decoder=True), "base_model_tp_plan", None) or {}
    return any(name.endswith("qkv_proj") for name in plan)


def _compiled(plan: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(re.escape(name).replace(r"\*", r"\d+")), style) for name, style in plan.items()]


def _first(plan: list[tuple[re.Pattern[str], str]], name: str) -> str | None:
    return next((style for pattern, style in plan if pattern.fullmatch(name)), None)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
