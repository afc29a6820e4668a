"""Options of raw2ids: what is refused, by name."""

from typing import Any

import pytest

from jllm.data.prepare.config import Raw2IdsConfig
from jllm.errors import UserError


def config(**values: Any) -> Raw2IdsConfig:
    return Raw2IdsConfig(**{"input": ("x",), "tokenizer": "y", **values})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num": 0}, "--num 0: give at least 1"),
        ({"batch_size": -1}, "--batch_size -1: give at least 1"),
        ({"max_len": 1}, "--max_len 1: give at least 2"),
        ({"cores": 0}, "--cores 0"),
        ({"stack": True}, "--stack: only for -t pretrain"),
        ({"type": "pretrain", "stack": True, "packing": "best_fit"}, "--packing best_fit: not together"),
        ({"stride": 5}, "--stride: only for -t pretrain"),
        ({"doc_suffix": "x"}, "--doc_suffix: only for -t pretrain"),
        ({"type": "pretrain", "filter": True}, "--filter: only for -t ft"),
        ({"type": "pretrain", "chat_template": "chatml"}, "--chat_template: only for -t ft"),
        ({"type": "pretrain", "pad": True}, "--pad: for -t ft or --packing best_fit"),
        ({"pad_to_multiple_of": 0}, "--pad_to_multiple_of 0: give at least 1"),
        ({"type": "pretrain", "stride": 2048}, "--stride 2048: give 1 to max_len - 1"),
        ({"type": "pretrain", "stack": True, "stride": 5}, "--stride 5"),
        ({"eval_output": "x"}, "--eval_output x: say with --eval_fraction"),
        ({"eval_fraction": 0.1, "max_rows": 5}, "--max_rows: not together with --eval_fraction"),
        ({"max_tokens": 0}, "--max_tokens 0: give at least 1"),
    ],
)
def test_what_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        config(**values)
    assert str(error.value).startswith(said)


def test_what_goes_together() -> None:
    config(type="pretrain", packing="best_fit", pad=True)
    config(pad_to_multiple_of=64, packing="best_fit", eval_fraction=0.5)
    config(type="pretrain", stride=2047)
