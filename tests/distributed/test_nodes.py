"""Two nodes: what differs between them ends both with one line before anything is trained.

The same code says all of it, so most ends are those of ranks alone; what the launchers make of one is shown with them.
With JLLM_TEST_SIZE 2, ends through launchers are shown on either side."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.nodes import Ended, run_nodes, run_ranks
from tests.fixtures import random_rows, tiny_llama, write_rows

LINE = ("--pipe_parallel_size", "2", "--precision", "fp32", "--max_steps", "2")
IN_FULL = int(os.environ.get("JLLM_TEST_SIZE", "1")) > 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    tiny_llama(folder / "model", tied=False)
    for name, seed in (("data", 1), ("other-data", 2)):
        write_rows(folder / name, random_rows(20, seed=seed), files=2)
    for name in ("other-weights", "other-config"):
        shutil.copytree(folder / "model", folder / name)
    shutil.copytree(folder / "model", folder / "copy")
    weights = folder / "other-weights/model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 2.0)
    save_file(tensors, weights, metadata={"format": "pt"})
    config = folder / "other-config/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.5}))
    return folder


def line(*, model: str = "model", data: str = "data", more: Sequence[str] = ()) -> list[str]:
    return [*LINE, "--model", model, "--train_data", data, *more]


def assert_one_line(ended: list[Ended], *parts: str) -> None:
    for node in ended:
        assert node.code == 2, node.output
        assert len(node.errors) == 1, node.output
        assert all(part in node.errors[0] for part in parts), node.errors
        assert "Traceback" not in node.output


DIFFERENCES: dict[str, tuple[list[str], Mapping[str, str], tuple[str, ...]]] = {
    "steps": (line(more=["--max_steps", "3"]), {}, ("--max_steps is 3 there, 2 on rank 0",)),
    "rate": (line(more=["--learning_rate", "3e-4"]), {}, ("--learning_rate is 0.0003 there, 1e-05 on rank 0",)),
    "seed": (line(more=["--seed", "7"]), {}, ("--seed is 7 there, 1234 on rank 0",)),
    "data": (line(data="other-data"), {}, ("--train_data", "other-data", "data")),
    "weights": (line(model="other-weights"), {}, ("weights (hash) of model.norm.weight is",)),
    "config": (line(model="other-config"), {}, ("config.json rms_norm_eps is 0.5 there",)),
    "environment": (
        line(),
        {"NCCL_ALGO": "Tree"},
        ("environment variable NCCL_ALGO is Tree there, nothing on rank 0",),
    ),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_a_difference_is_one_line_on_both(folder: Path, tmp_path: Path, what: str) -> None:
    other, environment, parts = DIFFERENCES[what]
    ended = run_ranks(folder, tmp_path, line(), other, environment={1: environment})
    assert_one_line(ended, "rank 1 on ", "differs from rank 0 on ", *parts)


def test_the_version(folder: Path, tmp_path: Path) -> None:
    """Another state of the code, under the same number."""
    import jllm

    shutil.copytree(Path(jllm.__file__).parent, tmp_path / "jllm", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "jllm/another.py").write_text('"""Another module."""\n')
    ended = run_nodes(folder, line(), line(), environment={1: {"PYTHONPATH": str(tmp_path)}})
    assert_one_line(ended, "jllm is 0.1.0 (code ")


@pytest.mark.parametrize("devices", [{1: [1, 2]}, {0: [1, 2]}][: 2 if IN_FULL else 1])
def test_the_number_of_devices(folder: Path, devices: Mapping[int, Sequence[int]]) -> None:
    """One node believes that the other has another number of them; nobody waits for ranks that never come."""
    more = ["--pipe_parallel_size", "1"]
    ended = run_nodes(folder, line(more=more), line(more=more), devices=devices)
    assert_one_line(ended, "the number of processes is")


@pytest.mark.parametrize(
    ("mistake", "number"),
    [(["--unknown"], 0), (["--model", "nowhere"], 1), (["--unknown"], 1), (["--model", "nowhere"], 0)],
)
def test_a_mistake_on_one_side(folder: Path, tmp_path: Path, mistake: list[str], number: int) -> None:
    lines = [line(), line()]
    lines[number] += mistake
    ended = run_ranks(folder, tmp_path, *lines)
    assert_one_line(ended, mistake[-1].lstrip("-"))
    assert f"rank {number} on " in ended[1 - number].errors[0]
    assert "does not start" in ended[1 - number].errors[0]


def test_what_means_the_same_is_no_difference(folder: Path) -> None:
    """Copies of the model in another place, and options in other words."""
    one = line(more=["--learning_rate", "1e-3", "--zero_stage", "0", "--num_workers", "0"])
    other = line(model="copy", data="data=1.0", more=["--learning_rate", "0.001", "--gradient_accumulation_steps", "1"])
    ended = run_nodes(folder, one, other)
    assert [node.code for node in ended] == [0, 0], [node.output for node in ended]


@pytest.mark.parametrize("waits", [0, 1][: 2 if IN_FULL else 1])
def test_a_node_that_never_comes(folder: Path, waits: int) -> None:
    from jllm.parallel.ports import free_port
    from tests.distributed.launched import Run, end_group
    from tests.distributed.nodes import node_command

    run = Run([*node_command(waits, port=free_port()), *line(more=["--join_timeout", "3"])], folder)
    try:
        output = run.output(timeout=60)
    finally:
        end_group(run)
    [error] = [each for each in output.splitlines() if each.startswith("error")]
    assert run.returncode == 1
    assert f"rank {1 - waits}" in error
    assert "did not come within 3 s" in error
