"""Who reads the data, what is refused, and what comes out at the end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jllm.data.dataset.manifest import Manifest, Tokenizer, read_manifest, write_manifest
from tests.distributed.ranks import Ranks
from tests.distributed.runs import options_of, records, train_rank
from tests.fixtures import VOCABULARY, random_rows, tiny_llama, write_rows

BRIEF = {"gradient_accumulation_steps": 2, "max_steps": 2}


def train_rank_with_data_on_readers_only(options: dict[str, Any], pipe: int, folder: Path) -> str | None:
    """Folders of the same names are there for the first rank of each pipeline, and nowhere else."""
    import contextlib
    import os

    with contextlib.chdir("/" if int(os.environ["RANK"]) % pipe else folder):
        return train_rank({**options, "train_data": ("data",), "eval_data": ("eval",)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data-path")
    tiny_llama(folder / "model", tied=False)
    write_rows(folder / "data", random_rows(12, packed=True), files=2)
    write_rows(folder / "eval", random_rows(3, seed=1))
    return folder


@pytest.mark.parametrize(("world_size", "pipe"), [(2, 2), (3, 3), (4, 2)])
def test_only_first_stages_read(ranks: Callable[[int], Ranks], folder: Path, world_size: int, pipe: int) -> None:
    log = folder / f"log-{world_size}-{pipe}"
    options = options_of(folder, BRIEF, pipe_parallel_size=pipe, log_dir=log)
    assert ranks(world_size).run(train_rank_with_data_on_readers_only, options, pipe, folder) == [None] * world_size
    assert len(records(log)) == 2
    assert len(records(log, "eval_loss")) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"train_data": ("nowhere",)}, "no such folder"),
        ({"seq_len": 8}, "--seq_len 8"),
        ({"pipe_parallel_size": 9}, "--pipe_parallel_size 9 does not divide"),
        ({"global_batch_size": 3, "gradient_accumulation_steps": None, "per_device_train_batch_size": 2}, "3 is not a"),
        ({"model": Path("nowhere")}, "'nowhere' does not exist"),
        ({"partition_method": "3,3"}, "3,3"),
        ({"resume_ckpt": "nowhere"}, "no complete checkpoint"),
        ({"num_warmup_steps": 3}, "--num_warmup_steps 3"),
        ({"ds_config": Path("nowhere.json")}, "--ds_config nowhere.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_one_line_on_every_rank(
    ranks: Callable[[int], Ranks], folder: Path, more: dict[str, Any], said: str
) -> None:
    for answer in ranks(2).run(train_rank, options_of(folder, BRIEF, **more)):
        assert answer is not None
        assert said in answer
        assert "\n" not in answer


def test_empty_folder_and_model_without_weights(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_bytes((folder / "model/config.json").read_bytes())
    for more, said in (
        ({"train_data": (str(tmp_path / "empty"),)}, "no Parquet shards"),
        ({"model": tmp_path / "bare"}, "has no weights"),
    ):
        answers = ranks(2).run(train_rank, options_of(folder, BRIEF, **more))
        assert all(answer is not None and said in answer for answer in answers)


def test_token_beyond_the_vocabulary(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "data", [{"input_ids": [1, 2, VOCABULARY, 3]}, {"input_ids": [1, 2, 3]}])
    # One process: the reader alone meets it, and here nobody ends the ranks that wait for it.
    [answer] = ranks(1).run(
        train_rank, options_of(folder, BRIEF, train_data=(str(tmp_path / "data"),), pipe_parallel_size=1)
    )
    assert answer is not None
    assert f"token id {VOCABULARY}" in answer


def test_shards_of_another_tokenizer(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel

    tiny_llama(tmp_path / "model", tied=False)
    backend = Backend(WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "model/tokenizer.json"))
    (tmp_path / "model/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    write_rows(tmp_path / "data", random_rows(4))
    manifest = read_manifest(tmp_path / "data")
    assert manifest is not None
    other = Tokenizer(name="other", vocab_size=VOCABULARY, sha256="0" * 64)
    write_manifest(tmp_path / "data", Manifest(command="test", options={}, files=manifest.files, tokenizer=other))
    answers = ranks(2).run(
        train_rank, options_of(folder, BRIEF, model=tmp_path / "model", train_data=(str(tmp_path / "data"),))
    )
    assert all(answer is not None and "made with the tokenizer other" in answer for answer in answers)


def test_exported_folder(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """A bf16 source comes out as bf16, with its other files, equal from the run and from its checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    source = tiny_llama(tmp_path / "source", tied=True, dtype="bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).write_text("{}")
    options = options_of(folder, BRIEF, model=source, output_dir=tmp_path / "out", checkpoint=tmp_path / "ckpt")
    # Files of the tokenizer are only copied here, so the shards' tokenizer is not compared.
    assert ranks(2).run(train_rank, options) == [None] * 2
    assert {path.name for path in source.iterdir() if path.suffix != ".safetensors"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    again = {**options, "output_dir": tmp_path / "again", "num_train_epochs": 0, "from_ckpt": tmp_path / "ckpt"}
    assert ranks(2).run(train_rank, {**again, "tag": "step-00000002", "checkpoint": None}) == [None] * 2
    ids = torch.arange(20)[None] % VOCABULARY
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("source", "out", "again")]
    assert [model.dtype for model in models] == [torch.bfloat16] * 3
    before, after, converted = (model.float()(ids).logits for model in models)
    assert torch.equal(after, converted)
    assert not torch.allclose(before, after)
