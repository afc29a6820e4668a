"""ALiBi: documents stay apart, near keys too in half precision, and what is saved has the published layout."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from jllm.errors import UserError
from jllm.models.legacy.rewriting import convert_checkpoint
from jllm.models.pipeline.span import spans_of
from jllm.models.weights.loading import load_stage
from jllm.models.weights.saving import save_stage, write_companions, write_index
from tests.models.chain import chained_loss_and_gradients, kept_logits, load_chain, packed_batch
from tests.models.legacy.published import (
    CASES,
    VOCAB,
    chained_logits,
    publish,
)

torch.set_num_threads(1)


@pytest.mark.parametrize("case", ["baichuan-13b", "baichuan2-13b"])
def test_alibi_goes_back_to_its_layout(case: str, tmp_path: Path) -> None:
    weights = publish(case, tmp_path / "old")
    for span in spans_of([0, 1, 3]):
        model = load_stage(tmp_path / "old", span, dtype=torch.float32)
        save_stage(model, span, tmp_path / "new")
    write_companions(model, tmp_path / "new", dtype=torch.float32, source=tmp_path / "old")
    assert set(write_index(tmp_path / "new")) == set(weights)
    ids = packed_batch(VOCAB)[0][0]
    expected = CASES[case][2](weights, ids)
    torch.testing.assert_close(chained_logits(tmp_path / "new", ids, [0, 3]), expected, atol=2e-5, rtol=1e-4)
    assert (tmp_path / "new" / "modeling_old.py").exists()
    with pytest.raises(UserError, match="ALiBi"):
        convert_checkpoint(tmp_path / "old", tmp_path / "other")


def test_packed_documents_stay_apart_with_alibi(tmp_path: Path) -> None:
    publish("baichuan-13b", tmp_path)
    kept: list[Tensor] = []
    stages = load_chain(tmp_path, [0, 1, 3])
    stages[-1].objective = kept_logits(kept)
    ids, integers = packed_batch(VOCAB)
    chained_loss_and_gradients(stages, ids, integers)
    alone = torch.stack([torch.zeros(1, 9, dtype=torch.long), torch.arange(9)[None]])
    chained_loss_and_gradients(stages, ids[:1, 5:14], alone)
    torch.testing.assert_close(kept[0][:1, 5:14], kept[1], atol=1e-5, rtol=1e-4)


def test_alibi_tells_near_keys_apart_in_half_precision_wherever_in_a_row(tmp_path: Path) -> None:
    weights = publish("baichuan-13b", tmp_path)
    rounded = {name: weight.to(torch.bfloat16).float() for name, weight in weights.items()}
    ids = torch.randint(VOCAB, (1024,), generator=torch.Generator().manual_seed(2))
    document = ids[:48]
    expected = CASES["baichuan-13b"][2](rounded, document)

    def error(row: Tensor, positions: Tensor) -> float:
        found = chained_logits(tmp_path, row, [0, 1, 3], dtype=torch.bfloat16, positions=positions)
        difference = found[: len(document)].float() - expected
        return float(difference.square().mean().sqrt() / expected.square().mean().sqrt())

    alone = error(document, torch.arange(48))
    whole = error(ids, torch.arange(1024))
    packed = error(ids, torch.cat([torch.arange(48), torch.arange(976)]))
    assert alone < 0.02
    # Rounding of the rest varies a little with the length, by the kernel's blocks.
    assert max(whole, packed) < 1.2 * alone
