"""The output is the permutation, whatever the memory and the cores; and it is checked that it fits."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jllm.commands.shuffle_datasets import main as shuffle_datasets
from jllm.data.dataset.manifest import open_data_set
from jllm.data.shuffle import passes, scatter
from jllm.data.shuffle.data_set import Resources, shuffle_set
from jllm.data.shuffle.layout import destinations
from tests.data.sets import content, make_set, row_numbers

SIZE = float(os.environ.get("JLLM_TEST_SIZE", "1"))
AMPLE = Resources(cores=2, memory=1 << 30)


def run(command: object, *args: object) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args])  # type: ignore[arg-type]


def out_of_core(monkeypatch: pytest.MonkeyPatch) -> Resources:
    """A cap that nothing fits under, with buckets of a few rows."""
    monkeypatch.setattr(passes, "MIN_BUCKET", 1 << 10)
    return Resources(cores=2, memory=8 << 10)


@pytest.mark.parametrize("cores", [1, 3, 8])
def test_the_number_of_processes_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    source = open_data_set(make_set(tmp_path / "a", 1000, files=5))
    shuffle_set(source, tmp_path / "1/out", blocks=3, seed=7, resources=AMPLE)
    monkeypatch.setattr(passes, "MIN_BUCKET", 1 << 10)
    monkeypatch.setattr(passes, "WORKER_BYTES", 1 << 10)
    monkeypatch.setattr(passes, "OWN_BYTES", 1 << 8)
    begun: list[int] = []
    results_of = passes.results_of

    def counted(count: int, *arguments: Any, threads: bool, **named: Any) -> list[Any]:
        begun.append(0 if threads else count)
        return results_of(count, *arguments, threads=threads, **named)

    monkeypatch.setattr(passes, "results_of", counted)
    shuffle_set(source, tmp_path / "2/out", blocks=3, seed=7, resources=Resources(cores=cores, memory=8 << 10))
    assert begun == ([0, 0] if cores == 1 else [cores, 3])
    assert content(tmp_path / "2/out") == content(tmp_path / "1/out")
    assert not (tmp_path / "2/out/.scratch").exists()


@pytest.mark.parametrize("rows", [0, 1, 257, 1000])
def test_output_is_the_same_for_any_cores_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    source = open_data_set(make_set(tmp_path / "a", rows, files=5))
    shuffle_set(source, tmp_path / "1/out", blocks=3, seed=7, resources=Resources(cores=1, memory=1 << 30))
    shuffle_set(source, tmp_path / "2/out", blocks=3, seed=7, resources=AMPLE)
    capped = out_of_core(monkeypatch)
    spilled: list[int] = []
    spill = scatter.Scatter.spill
    monkeypatch.setattr(scatter.Scatter, "spill", lambda self: (spilled.append(len(self.slices)), spill(self))[1])
    shuffle_set(source, tmp_path / "3/out", blocks=3, seed=7, resources=capped)
    assert content(tmp_path / "1/out") == content(tmp_path / "2/out") == content(tmp_path / "3/out")
    if rows >= 257:
        assert sum(spilled) > 10, "the capped run was meant to use the disk"


def test_output_is_the_permutation(tmp_path: Path) -> None:
    source = open_data_set(make_set(tmp_path / "a", 100, files=3))
    shuffle_set(source, tmp_path / "out", blocks=3, seed=7, resources=AMPLE)
    to = destinations(100, fingerprint=source.manifest.fingerprint, seed=7)
    assert row_numbers(tmp_path / "out") == np.argsort(to).tolist()
    other = destinations(100, fingerprint=source.manifest.fingerprint, seed=8)
    assert (to != other).any()


@given(
    files=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    blocks=st.integers(1, 9),
    seed=st.integers(0, 2**32),
    small=st.booleans(),
)
@settings(
    max_examples=int(25 * SIZE),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_multiset_is_kept(
    tmp_path_factory: pytest.TempPathFactory, files: list[int], blocks: int, seed: int, small: bool
) -> None:
    folder = tmp_path_factory.mktemp("case")
    source = make_set(folder / "a", sum(files), files=len(files))
    with pytest.MonkeyPatch.context() as patch:
        resources = out_of_core(patch) if small else AMPLE
        shuffle_set(open_data_set(source), folder / "out", blocks=blocks, seed=seed, resources=resources)
    assert sorted(row_numbers(folder / "out")) == list(range(sum(files)))
    sizes = [entry.rows for entry in open_data_set(folder / "out").manifest.files]
    assert max(sizes) - min(sizes) <= 1


def test_too_small_a_disk_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_set(tmp_path / "D/a", 50, files=3)
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and _Usage())
    result = run(shuffle_datasets, "-d", tmp_path / "D")
    assert result.exit_code == 2
    assert "of disk" in result.stderr
    assert not (tmp_path / "D-sf").exists(), "not a byte was written"


class _Usage:
    free = 1000
