"""The folder of control adapters: the same whatever the number of stages, and nothing of the base in it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from jllm.models.adapters.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from jllm.models.adapters.control import attach_control
from jllm.models.adapters.control_folder import KIND, control_folder
from tests.fixtures import tiny_llama
from tests.models.chain import load_chain


def test_one_folder_of_any_number_of_stages(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model", tied=True)
    written = []
    for name, boundaries in (("one", [0, 4]), ("three", [0, 1, 3, 4])):
        folder = tmp_path / name
        folder.mkdir()
        left = control_folder(rank=3, layers=frozenset({0, 2, 3}), base="model")
        for stage in load_chain(tmp_path / "model", boundaries):
            options = {"prefix": "model.layers", "layers": {0, 2, 3}, "width": 32, "seed": 1}
            attach_control(stage.model, rank=3, dtype=torch.float32, **options)  # type: ignore[arg-type]
            assert left.size(stage.model) == sum(
                each.nbytes for _, tensors in left.stage_files(stage.model, stage.span) for each in tensors.values()
            )
            for file, tensors in left.stage_files(stage.model, stage.span):
                from safetensors.torch import save_file

                save_file(tensors, folder / file)
            left.write_companions(stage.model, folder, chat_template=None)
        assert not left.has_weights(folder)
        left.complete(folder)
        assert left.has_weights(folder)
        assert {path.name for path in folder.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}
        written.append(load_file(folder / WEIGHTS_NAME))
        assert json.loads((folder / CONFIG_NAME).read_text()) == {
            "peft_type": KIND,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "model",
            "r": 3,
            "layers_to_transform": [0, 2, 3],
        }
    assert written[0].keys() == written[1].keys()
    assert set(written[0]) == {
        f"base_model.model.model.layers.{layer}.control_{kind}" for layer in (0, 2, 3) for kind in "QS"
    }
    assert all(torch.equal(value, written[1][name]) for name, value in written[0].items())
