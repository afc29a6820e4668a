"""`jllm convert`: what plain transformers loads has the published logits; ending early leaves nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from jllm.commands import convert
from jllm.errors import UserError
from jllm.models.legacy.rewriting import convert_checkpoint
from tests.models.chain import packed_batch
from tests.models.legacy.published import (
    CASES,
    VOCAB,
    publish,
    qwen,
)

torch.set_num_threads(1)


@pytest.mark.parametrize("case", ["qwen", "internlm2", "baichuan-7b", "baichuan2-7b"])
def test_convert(case: str, tmp_path: Path) -> None:
    weights = publish(case, tmp_path / "old", pickled=case == "baichuan-7b")
    ids = packed_batch(VOCAB)[0][0]
    convert_checkpoint(tmp_path / "old", tmp_path / "new")
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(plain(ids[None]).logits[0], CASES[case][2](weights, ids), atol=2e-5, rtol=1e-4)
    assert not (tmp_path / "new" / "modeling_old.py").exists()


def test_a_conversion_that_ends_early_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = publish("qwen", tmp_path / "old")
    with monkeypatch.context() as broken:
        broken.setattr("jllm.models.legacy.rewriting.write_companions", None)
        with pytest.raises(TypeError):
            convert_checkpoint(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    done = CliRunner().invoke(convert.main, ["-m", str(tmp_path / "old"), "-o", str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    assert done.output.strip() == f"wrote {tmp_path / 'new'} as Qwen2ForCausalLM"
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}
    ids = packed_batch(VOCAB)[0][0]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    torch.testing.assert_close(plain(ids[None]).logits[0], qwen(weights, ids), atol=2e-5, rtol=1e-4)
    with pytest.raises(UserError, match="not empty"):
        convert_checkpoint(tmp_path / "old", tmp_path / "new")
    with pytest.raises(UserError, match="loads as it is"):
        convert_checkpoint(tmp_path / "new", tmp_path / "newer")


@pytest.mark.parametrize("given", ["missing", "empty"])
def test_a_folder_that_is_no_model_is_named_at_once(tmp_path: Path, given: str) -> None:
    """Before anything large is imported: a process that could not even import torch says it."""
    (tmp_path / "empty").mkdir()
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None;"
        "from jllm.commands.convert import main; main(sys.argv[1:])"
    )
    words = ["-m", str(tmp_path / given), "-o", str(tmp_path / "new")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert str(tmp_path / given) in done.stderr
    assert done.stderr.count("\n") == 1
