"""The data sets of a run: where they lie, and which options are recorded."""

from pathlib import Path
from typing import Any

import pytest

from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.prepare.outputs import NOT_IN_THE_MANIFEST, beside, outputs_of, recorded_options
from jllm.data.sources.inputs import resolve
from jllm.errors import UserError


def config(**values: Any) -> Raw2IdsConfig:
    return Raw2IdsConfig(**{"input": ("x",), "tokenizer": "models/Some-Model", **values})


def test_the_default_is_beside_the_input(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl.gz").touch()
    for given, wanted in ((tmp_path / "in", "in_Some-Model"), (tmp_path / "in" / "a.jsonl.gz", "in/a_Some-Model")):
        assert beside(config(input=(str(given),)), resolve([str(given)])) == tmp_path / wanted
    for remote in ("-", "s3://bucket/a.jsonl"):
        with pytest.raises(UserError, match="say where the data set goes with -o"):
            beside(config(input=(remote,)), [])


def test_what_decides_is_recorded() -> None:
    recorded = recorded_options(config(seed=5))
    assert not {*recorded} & {*NOT_IN_THE_MANIFEST, "seed"}
    assert recorded["max_len"] == 2048
    assert recorded_options(config(seed=5, eval_fraction=0.1))["seed"] == 5


def test_held_out_documents_have_a_folder_of_their_own(tmp_path: Path) -> None:
    output = tmp_path / "set"
    (only,) = outputs_of(config(), output)
    assert (only.name, only.place.folder, only.options, only.share) == ("main", output, {}, 1.0)
    main, held = outputs_of(config(eval_fraction=0.25), output)
    assert (main.name, main.place.folder) == ("main", output)
    assert (held.name, held.place.folder, held.share) == ("eval", tmp_path / "_eval" / "set", 0.25)
    assert held.options == {"part": "eval"}
    for inside in (output, output / "eval", tmp_path):
        with pytest.raises(UserError, match="give a folder of its own"):
            outputs_of(config(eval_fraction=0.25, eval_output=inside), output)
