"""A run with `--compile on` on two stages, of slices or with shared rows, is that of one plain process, and says so."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import Ranks
from tests.distributed.reference import batches_in_order, train_reference
from tests.distributed.runs import records, train_rank_into
from tests.fixtures import VOCABULARY, random_rows, tiny_llama, write_rows
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config

STEPS = 3


def fails(graph: Any, inputs: Any) -> Any:
    """A backend whose code ends where it begins."""

    def run(*arguments: Any) -> Any:
        raise RuntimeError("no kernel for this device")

    return run


def train_compiled(options: dict[str, Any], console: Path, without: int | None = None) -> tuple[str | None, int, str]:
    """A rank's answer, how many graphs it made, and where its code would be kept;
    rank `without` has a compiler whose code fails."""
    import os

    from torch._dynamo.utils import counters

    import jllm.train.compiling

    # The first is quick: it writes no code.
    backend: Any = fails if without == int(os.environ["RANK"]) else "aot_eager"
    jllm.train.compiling.BACKEND = backend
    with console.open("a") as file, contextlib.redirect_stderr(file):
        answer = train_rank_into(options, console)
    return answer, int(counters["stats"]["unique_graphs"]), os.environ["TORCHINDUCTOR_CACHE_DIR"]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"model_parallel_size": 2, "split_dlayer": True, "partition_method": "3,5"},
        {"sequence_parallel_size": 2, "sequence_parallel_mode": "balanced"},
        {"sequence_parallel_size": 2, "sequence_parallel_mode": "ulysses"},
    ],
    ids=str,
)
def test_equals_one_process(ranks: Callable[[int], Ranks], tmp_path: Path, more: dict[str, Any]) -> None:
    model = tiny_llama(tmp_path / "model", tied=True)
    data = write_rows(tmp_path / "data", random_rows(14, labels=True, packed=True), files=3)
    held_out = write_rows(tmp_path / "held out", random_rows(6, labels=True, packed=True), files=1)
    options = {"optimizer": "sgd", "learning_rate": 0.05, "gradient_clipping": 0.7, "seed": 7}
    found = ranks(4 if more else 2).run(
        train_compiled,
        {
            **options,
            "model": model,
            "train_data": (str(data),),
            "eval_data": (f"held={held_out}",),
            "precision": "fp32",
            "pipe_parallel_size": 2,
            **more,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
            "checkpoint_grad_interval": 1,
            "max_steps": STEPS,
            "lr_scheduler_type": "constant",
            "output_dir": tmp_path / "out",
            "compile": "on",
        },
        tmp_path / "console",
    )
    said = (tmp_path / "console").read_text()
    assert "decoder layers are compiled" in said
    assert "is not compiled" not in said
    for answer, graphs, folder in found:
        assert answer is None
        # Training and evaluation, at the usual shape and at others; before and behind attention over shared rows; of
        # whole layers and of a half.
        assert 2 <= graphs <= (12 if "sequence_parallel_size" in more else 8 if "split_dlayer" in more else 4)
        assert Path(folder).stat().st_mode & 0o077 == 0
    losses, norms, weights = train_reference(
        model, batches_in_order(data, steps=STEPS, global_batch=4, seed=7), options=options
    )
    steps = records(tmp_path / "out/log")
    np.testing.assert_allclose([record["loss"] for record in steps], losses, atol=1e-5)
    np.testing.assert_allclose([record["grad_norm"] for record in steps], norms, rtol=1e-4)
    for path in (tmp_path / "out").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            torch.testing.assert_close(tensor, weights[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("inner", "without", "note"),
    [
        (64, 1, "is not compiled, and runs as it is: no kernel for this device"),
        (65, None, "note: decoder layers of stage 0 are not compiled: its slices are of unlike sizes"),
    ],
    ids=["no compiler", "unlike slices"],
)
def test_slices_that_are_not_compiled_keep_nobody_waiting(
    ranks: Callable[[int], Ranks], tmp_path: Path, inner: int, without: int | None, note: str
) -> None:
    model = tmp_path / "model"
    make_folder(tiny_config("llama", tied=True, vocab_size=VOCABULARY, intermediate_size=inner), model)
    data = write_rows(tmp_path / "data", random_rows(14, labels=True, packed=True), files=3)
    options = {"optimizer": "sgd", "learning_rate": 0.05, "gradient_clipping": 0.7, "seed": 7}
    given = {
        **options,
        "model": model,
        "train_data": (str(data),),
        "precision": "fp32",
        "model_parallel_size": 2,
        "global_batch_size": 4,
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "lr_scheduler_type": "constant",
        "log_dir": tmp_path / "log",
        "compile": "on",
    }
    found = ranks(2).run(train_compiled, given, tmp_path / "console", without)
    assert [answer for answer, *_ in found] == [None, None]
    assert note in (tmp_path / "console").read_text()
    losses, norms, _ = train_reference(
        model, batches_in_order(data, steps=STEPS, global_batch=4, seed=7), options=options
    )
    steps = records(tmp_path / "log")
    np.testing.assert_allclose([record["loss"] for record in steps], losses, atol=1e-5)
    np.testing.assert_allclose([record["grad_norm"] for record in steps], norms, rtol=1e-4)
