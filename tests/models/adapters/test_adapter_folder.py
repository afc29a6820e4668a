"""A folder of adapters: complete by its marker, its parts joined into one file; a stage without any adds nothing."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from jllm.models.adapters.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from jllm.models.adapters.adapter_folder import AdapterFolder
from tests.fixtures import tiny_llama
from tests.models.chain import load_chain


def test_parts_become_one_file(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model", tied=False)
    stages = load_chain(tmp_path / "model", [0, 2, 4])
    values = {0: {"b": torch.arange(3.0), "a": torch.ones(2, 2)}, 1: {}}
    now = 0
    left = AdapterFolder(fields={"b": [2, 1], "a": 1}, tensors=lambda model: values[now])
    for now, stage in enumerate(stages):  # noqa: B007 - what the folder is asked for
        for file, tensors in left.stage_files(stage.model, stage.span):
            save_file(tensors, tmp_path / file)
    left.write_companions(stages[0].model, tmp_path, chat_template="ignored")
    left.complete(tmp_path)
    found = load_file(tmp_path / WEIGHTS_NAME)
    assert {name: value.tolist() for name, value in found.items()} == {"b": [0.0, 1.0, 2.0], "a": [[1.0, 1.0]] * 2}
    assert (tmp_path / left.marker).read_text() == '{\n  "a": 1,\n  "b": [\n    2,\n    1\n  ]\n}\n'
    assert left.marker == CONFIG_NAME
    assert sorted(path.name for path in tmp_path.glob("adapter*")) == [CONFIG_NAME, WEIGHTS_NAME]
