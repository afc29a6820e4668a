"""Every named family: stages equal the whole model, tied and untied; what they save is what they loaded."""

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, PretrainedConfig

from jllm.commands import list_models
from jllm.errors import UserError
from jllm.models.families import NAMED, REFUSED, catalogue, check_block_mask, check_split, shown_halves
from jllm.models.pipeline.carving import carve
from jllm.models.pipeline.span import StageSpan
from jllm.models.weights.source import causal_class
from tests.models.chain import (
    chained_loss_and_gradients,
    load_chain,
    packed_batch,
    whole_loss_and_gradients,
    worst_gradient,
)
from tests.models.family_check import compare_family, isolates_documents, load_whole, make_folder
from tests.models.tiny import causal_types, has_plan, tiny_config

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", NAMED)
def test_named_family(family: str, tied: bool, tmp_path: Path) -> None:
    make_folder(tiny_config(family, tied=tied), tmp_path / "whole")
    whole = load_whole(tmp_path / "whole")
    assert bool(whole.all_tied_weights_keys) == tied
    difference = compare_family(whole, tmp_path / "whole", tmp_path / "saved")
    assert difference.is_equal, difference
    assert isolates_documents(whole)


def test_comparison_sees_one_changed_weight(tmp_path: Path) -> None:
    """The comparison above can fail: stages of another model differ, and so does their export."""
    make_folder(tiny_config("llama"), tmp_path / "whole")
    whole = load_whole(tmp_path / "whole")
    with torch.no_grad():
        whole.model.layers[2].mlp.up_proj.weight[0, 0] += 0.1
    difference = compare_family(whole, tmp_path / "whole", tmp_path / "saved")
    assert not difference.is_equal
    assert difference.where.startswith("2 stages, plain rows")


def test_layers_that_share_a_selection(tmp_path: Path) -> None:
    """Layer 1 takes the tokens that layer 0 selected, layer 3 those of layer 2: cut between the pairs."""
    make_folder(tiny_config("glm_moe_dsa", indexer_types=["full", "shared"] * 2, index_topk=4), tmp_path)
    ids, integers = packed_batch(96, packed=False)
    loss, gradients = whole_loss_and_gradients(load_whole(tmp_path), ids, integers)
    found, chained = chained_loss_and_gradients(load_chain(tmp_path, [0, 2, 4]), ids, integers)
    torch.testing.assert_close(found, loss, atol=1e-5, rtol=0)
    assert worst_gradient(gradients, chained)[0] < 1e-5


@pytest.mark.parametrize(
    ("family", "overrides", "says"),
    [
        ("gemma3n_text", {"hidden_size_per_layer_input": 8}, "own embedding"),
        ("gemma4_text", {"num_kv_shared_layers": 2}, "reuse keys"),
        ("hrm_text", {}, "over and over"),
        ("t5", {}, "encoder-decoder"),
        ("llava", {}, "decoder among other parts"),
    ],
)
def test_refusals_say_why(family: str, overrides: dict[str, object], says: str) -> None:
    config = tiny_config(family, **overrides)
    with pytest.raises(UserError, match=says) as caught:
        check_split(config, StageSpan(index=1, count=2, first_layer=2, end_layer=4))
    assert "\n" not in str(caught.value)
    check_split(config, StageSpan(index=0, count=1, first_layer=0, end_layer=4))


def test_block_mask_is_refused_where_documents_would_mix() -> None:
    check_block_mask(tiny_config("llama"))
    for family in ("mamba", "bloom"):
        with pytest.raises(UserError, match=f"--block_mask: model type '{family}'"):
            check_block_mask(tiny_config(family))


def test_catalogue() -> None:
    """The stored walk: nothing failed, what is refused says why, and it is of these types."""
    _, families = catalogue()
    status = {family.model_type: family.status for family in families}
    assert not [family for family in families if family.status == "failed"]
    assert all(status[name] == "pass" for name in NAMED)
    assert all(family.shown for family in families)
    assert [name for name in NAMED if not shown_halves(causal_class(tiny_config(name)))[0]] == ["cohere", "cohere2"]
    assert all(family.status == "pass" and not family.not_halved for family in families if family.halves)
    assert sum(bool(family.halves) for family in families) >= 95
    assert sum(family.in_slices in ("layers", "plan", "vocabulary") for family in families) >= 140
    assert sum(family.in_slices == "layers" for family in families) >= 110
    assert all(family.sliced for family in families if family.in_slices == "layers")
    assert sum(family.in_rows == "yes" for family in families) >= 84
    planned = [family for family in families if family.has_plan]
    assert len(planned) >= 85
    assert sum(family.status == "pass" for family in planned) >= 75
    assert [family.model_type for family in families] == causal_types(), "transformers changed: make test-families"
    assert all(family.has_plan == has_plan(family.model_type) for family in families)
    listed = CliRunner().invoke(list_models.main, [])
    assert listed.exit_code == 0
    table = listed.output
    assert re.search(r"^llama +pass +yes +varlen +yes +layers +yes +2 and 3 stages", table, re.MULTILINE)
    assert re.search(r"^nemotron +pass +yes +none +(yes|no) +layers +no +2 and 3 stages", table, re.MULTILINE)
    assert re.search(r"^bloom +pass +no +none +no +layers +no +2 and 3 stages", table, re.MULTILINE)
    assert re.search(r"^hrm_text +refused +it runs its two lists", table, re.MULTILINE)
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    for family in families:
        name = f"**{family.model_type}**" if family.model_type in NAMED else family.model_type
        facts = (family.status, family.apart, family.kernels, family.head, family.layers, family.half_layers)
        facts += (family.in_slices, family.in_norms, family.in_rows)
        columns = re.escape(" | ".join(facts))
        assert re.search(rf"^\| {re.escape(name)} \|.*\| {columns}", page, re.MULTILINE), family.model_type


def _cut(config: PretrainedConfig, span: StageSpan) -> None:
    check_split(config, span)
    with torch.device("meta"):
        carve(AutoModelForCausalLM.from_config(config), span)


def test_what_is_listed_as_refused_is_refused() -> None:
    """By its type or configuration, or when its layers are cut; never only in the table."""
    span = StageSpan(index=0, count=2, first_layer=0, end_layer=2)
    for family in catalogue()[1]:
        if family.status != "refused" or family.model_type in REFUSED:
            continue
        with pytest.raises(UserError):
            _cut(tiny_config(family.model_type), span)
    for name in REFUSED:
        with pytest.raises(UserError, match=re.escape(REFUSED[name])):
            check_split(PretrainedConfig(model_type=name), span)
