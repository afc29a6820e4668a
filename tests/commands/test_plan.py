"""`jllm plan`: a table, the flags of the fastest layout, JSON, and mistakes in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jllm.commands.plan import main
from jllm.train.config import TrainConfig
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    out = capsys.readouterr()
    return int(ended.value.code or 0), out.out, out.err


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(["-m", "llama-3-8b", "--gpus", "16", *words])
    return capsys.readouterr().out


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = plan(capsys, "--show", "3").splitlines()
    assert lines[0].split()[:4] == ["stages", "pipelines", "sequence", "slices"]
    assert len({len(line) for line in lines[:4]}) == 1
    speeds = [int(line.split()[-1].replace(",", "")) for line in lines[1:4]]
    assert speeds == sorted(speeds, reverse=True)
    assert lines[4].startswith("estimates for 16 GPUs")
    flags = lines[-1].removeprefix("the fastest: ").split()
    numbers = dict(zip(flags[::2], map(int, flags[1::2]), strict=True))
    assert all(
        name.removeprefix("--") in TrainConfig.__dataclass_fields__ or name == "--micro_batch_size" for name in numbers
    )


def test_a_program_reads_it() -> None:
    """Nothing else is on standard output, whatever is imported on the way."""
    command = [sys.executable, "-m", "jllm", "plan", "-m", "llama-3.2-1b", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert json.loads(done.stdout)["fitting"] > 10


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(plan(capsys, "--json", "--show", "2", "--gpu", "A100", "--gpu_memory", "38G"))
    assert len(found["layouts"]) == 2 <= found["fitting"]
    assert all(each["memory"] <= 38 * 2**30 for each in found["layouts"])
    sizes = [found["layouts"][0]["layout"][axis] for axis in ("pipe", "data", "sequence", "tensor")]
    assert sizes[0] * sizes[1] * sizes[2] * sizes[3] == 16


def test_what_is_left_out_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Ways that the trainer would refuse, for their family."""
    assert "left out" not in plan(capsys)
    assert "left out" not in plan(capsys, "--optimizer", "adamw_kahan")
    make_folder(tiny_config("mamba"), tmp_path)
    capsys.readouterr()  # of other packages, which greet
    main(["-m", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    given = [each.split(":")[0] for each in found["left_out"]]
    assert given == ["--sequence_parallel_size 2"]
    assert all(each["layout"]["sequence"] == 1 for each in found["layouts"])
    make_folder(tiny_config("phi", qk_layernorm=True, num_hidden_layers=2), tmp_path / "phi")
    assert "left out: --model_parallel_size: models of type 'phi' with self_attn.q_layernorm.weight" in plan(
        capsys, "-m", str(tmp_path / "phi")
    )


def test_flags_of_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Each where the fastest layout has it."""
    last = plan(capsys, "--gpus", "6", "--split_dlayer").splitlines()[-1]
    assert "--pipe_parallel_size" in last
    assert " --split_dlayer " in last
    assert "--split_dlayer" not in plan(capsys, "--gpus", "1", "-m", "llama-3.2-1b", "--split_dlayer")
    of_slices = plan(capsys, "--gpus", "8", "--gpu_memory", "38G", "--sequence_sharded_norms", "--seq_len", "1024")
    assert ("--model_parallel_size" in of_slices) == ("--sequence_sharded_norms" in of_slices)


def test_adapters_need_less(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")
    words = ("-m", "llama-3-8b", "--gpus", "1", "--lora_dim", "16", "--json")
    leanest = []
    for more in ([], ["--load_in_8bit"], ["--load_in_4bit"]):
        main([*words, *more, "--show", "100"])
        leanest.append(min(each["memory"] for each in json.loads(capsys.readouterr().out)["layouts"]))
    assert leanest[0] < 18 * 2**30
    assert leanest == sorted(leanest, reverse=True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--model"),
        (["-m", "llama-3-8b", "--load_in_4bit"], "--load_in_4bit: a quantised model is not trained itself"),
        (["-m", "llama-3-8b", "--load_in_4bit", "--load_in_8bit"], "--load_in_4bit and --load_in_8bit exclude"),
        (
            ["-m", "llama-3-8b", "--sequence_sharded_norms", "--lora_dim", "4"],
            "--sequence_sharded_norms with --lora_dim 4: tokens shared by slices were not shown to work with it",
        ),
        (["-m", "nowhere"], "--model nowhere: no such folder, and no published shape"),
        (["-m", "llama-3-8b", "--gpu", "abacus"], "--gpu abacus: its peak is not known"),
        (["-m", "llama-3-8b", "--gpu_memory", "much"], "--gpu_memory"),
        (["-m", "llama-3-70b", "-n", "1"], "no layout fits 75G a GPU: the leanest ("),
        (["-m", "llama-3-8b", "-n", "7", "--global_batch_size", "9", "--seq_len", "1"], None),
        (["-m", "llama-3-8b", "-n", "47", "--global_batch_size", "1"], "divides 1 rows a step"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], words: list[str], told: str | None) -> None:
    if told is None:
        main(words)  # seven stages
        assert "the fastest: --pipe_parallel_size 7" in capsys.readouterr().out
        return
    code, out, err = said(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert told in err
    assert err.count("\n") == 1
