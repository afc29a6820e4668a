"""Data of another tokenizer is refused with what differs, or trained on with a warning where the user insists."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from jllm.data.dataset.manifest import DataSet, Manifest, Tokenizer
from jllm.data.tokenizer.facts import load_tokenizer
from jllm.errors import UserError
from jllm.train.checks.tokenizers import check_tokenizer
from jllm.train.config import TrainConfig
from tests.data.tokenizers_for_tests import make_byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes")


def data_of(tokenizer: Tokenizer | None) -> DataSet:
    return DataSet(folder=Path("set"), manifest=Manifest(command="x", options={}, files=(), tokenizer=tokenizer))


def warnings_of(data_set: DataSet, model: Path, **more: Any) -> list[str]:
    return check_tokenizer(data_set, TrainConfig(model=model, train_data=("set",), **more))


def test_the_models_own_saved_anew(tmp_path: Path, tokenizer: Path) -> None:
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(tmp_path)
    assert warnings_of(data_of(load_tokenizer(str(tokenizer)).for_manifest), tmp_path) == []


def test_another_one(tmp_path: Path, tokenizer: Path) -> None:
    import tokenizers

    made_with = make_byte_tokenizer(tmp_path / "other", more=[tokenizers.AddedToken("<call>", special=True)])
    data_set = data_of(load_tokenizer(str(made_with)).for_manifest)
    with pytest.raises(
        UserError, match=r"set was made with the tokenizer other, .*'<call>' has the id .* there and none"
    ):
        warnings_of(data_set, tokenizer)
    [said] = warnings_of(data_set, tokenizer, force_tokenizer=True)
    assert "'<call>'" in said
    assert said.endswith("--force_tokenizer goes on")


def test_a_model_without_tokenizer_is_a_warning(tmp_path: Path, tokenizer: Path) -> None:
    recorded = load_tokenizer(str(tokenizer)).for_manifest
    [said] = warnings_of(data_of(recorded), tmp_path)
    assert said.startswith(f"--model {tmp_path} has no tokenizer")
    assert warnings_of(data_of(None), tmp_path) == []


def test_a_broken_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    shutil.copytree(tokenizer, tmp_path / "model")
    (tmp_path / "model/tokenizer.json").write_text("{")
    data_set = data_of(load_tokenizer(str(tokenizer)).for_manifest)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        warnings_of(data_set, tmp_path / "model")
    [said] = warnings_of(data_set, tmp_path / "model", force_tokenizer=True)
    assert "is not compared" in said
