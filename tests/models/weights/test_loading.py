"""Loading a stage: only its own tensors are read, ties must agree, and what has no place is named once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from jllm.errors import UserError
from jllm.models.pipeline.span import spans_of
from jllm.models.weights import loading
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config


def test_only_the_stage_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    class Slice:
        def __init__(self, inner: object, name: str) -> None:
            self.inner, self.name = inner, name

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

        def __getitem__(self, index: object) -> torch.Tensor:
            read.append(self.name)
            return self.inner[index]

    class Spy:
        def __init__(self, *args: object, **keywords: object) -> None:
            self.inner = safe_open(*args, **keywords)

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

        def __enter__(self) -> object:
            return self.inner.__enter__()

        def __exit__(self, *args: object) -> None:
            self.inner.__exit__(*args)

        def get_slice(self, name: str) -> Slice:
            return Slice(self.inner.get_slice(name), name)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.inner.get_tensor(name)

    monkeypatch.setattr("transformers.modeling_utils.safe_open", Spy)
    for span in spans_of([0, 1, 3, 4]):
        read.clear()
        model = loading.load_stage(folder, span, dtype=torch.float32)
        assert sorted(read) == sorted(name for name, _ in model.named_parameters())
        assert not any(parameter.is_meta for parameter in model.parameters())


def tied_folder(path: Path, **heads: torch.Tensor | None) -> None:
    """A tied model; `heads` (two underscores for a dot) are put into its file, and None takes a tensor out."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    changed = {**tensors, **{name.replace("__", "."): value for name, value in heads.items()}}
    kept = {name: value for name, value in changed.items() if value is not None}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("boundaries", [[0, 4], [0, 1, 3, 4]])
def test_a_tied_head_that_differs_is_refused(tmp_path: Path, boundaries: list[int]) -> None:
    tied_folder(tmp_path, lm_head__weight=torch.randn(96, 32))
    spans = spans_of(boundaries)
    for span in {spans[0], spans[-1]}:
        with pytest.raises(UserError, match=r"model\.safetensors holds a lm_head\.weight that differs"):
            loading.load_stage(tmp_path, span, dtype=torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    models = [loading.load_stage(tmp_path, span, dtype=torch.float32) for span in spans]
    assert not torch.equal(models[0].model.embed_tokens.weight, models[-1].lm_head.weight)


@pytest.mark.parametrize("boundaries", [[0, 4], [0, 1, 3, 4]])
def test_either_of_a_tied_pair_is_enough(tmp_path: Path, boundaries: list[int]) -> None:
    """Or both: the stages keep the embedding and the head, equal, and nothing more."""
    embedding = torch.randn(96, 32)
    tied_folder(tmp_path / "one", model__embed_tokens__weight=embedding)
    tied_folder(tmp_path / "both", lm_head__weight=embedding.clone(), model__embed_tokens__weight=embedding)
    tied_folder(tmp_path / "head", lm_head__weight=embedding.clone(), model__embed_tokens__weight=None)
    for name in ("one", "both", "head"):
        models = [loading.load_stage(tmp_path / name, span, dtype=torch.float32) for span in spans_of(boundaries)]
        first, last = models[0], models[-1]
        assert torch.equal(first.model.embed_tokens.weight, embedding), name
        assert torch.equal(last.lm_head.weight, embedding), name
        if len(boundaries) > 2:
            assert "lm_head.weight" not in dict(first.named_parameters())
            assert "model.embed_tokens.weight" not in dict(last.named_parameters())


@pytest.mark.parametrize("boundaries", [[0, 3], [0, 1, 2, 3]])
def test_tensors_without_a_place_are_named_once(
    folder: Path, tmp_path: Path, boundaries: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "more")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "more/config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    for span in spans_of(boundaries):
        loading.load_stage(tmp_path / "more", span, dtype=torch.bfloat16)
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: 9 tensors in ")
    assert "(model.layers.3.input_layernorm.weight, " in line


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_neox", "phi3"])
def test_tensors_of_other_stages_are_not_named(family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also where transformers reads them under other names than they have; without a prefix, as old files are."""
    make_folder(tiny_config(family), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    capfd.readouterr()
    for bare in (False, True) if family == "gpt2" else (False,):
        names = {name: name.removeprefix("transformer.") if bare else name for name in tensors}
        renamed = {names[name]: tensor for name, tensor in tensors.items()}
        save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        for span in spans_of([0, 1, 3, 4]):
            loading.load_stage(tmp_path, span, dtype=torch.float32)
    assert "warning" not in capfd.readouterr().err
