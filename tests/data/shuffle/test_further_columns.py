"""Further columns travel with their rows through every command, bit by bit, whatever the memory and the cores."""

from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jllm.commands.repartition import main as repartition
from jllm.commands.shuffle_datasets import main as shuffle_datasets
from jllm.commands.shuffle_partition import main as shuffle_partition
from jllm.data.dataset.columns import Column
from jllm.data.dataset.describe import verify
from jllm.data.dataset.manifest import open_data_set, read_manifest
from jllm.data.shuffle import passes, scatter
from jllm.data.shuffle.data_set import Resources, shuffle_set
from tests.data.sets import content
from tests.data.typed_sets import COLUMNS_OF_ANY_TYPE, EVERY_TYPE, bag, make_typed_set, rows_of_folder

AMPLE = Resources(cores=2, memory=1 << 30)
TINY = Resources(cores=2, memory=8 << 10)


def run(command: object, *args: object) -> Result:
    result = CliRunner().invoke(command, [str(arg) for arg in args])  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output
    return result


@given(
    further=COLUMNS_OF_ANY_TYPE,
    rows=st.integers(0, 60),
    files=st.integers(1, 4),
    blocks=st.integers(1, 4),
    small=st.booleans(),
    columns=st.sampled_from([("input_ids",), ("input_ids", "labels", "cu_seqlens")]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_rows_keep_all_columns(
    tmp_path_factory: pytest.TempPathFactory,
    further: list[Column],
    rows: int,
    files: int,
    blocks: int,
    small: bool,
    columns: tuple[str, ...],
) -> None:
    folder = tmp_path_factory.mktemp("case")
    source = make_typed_set(folder / "a", rows, further, files=files, columns=columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "MIN_BUCKET", 1 << 10)
        resources = TINY if small else AMPLE
        made = shuffle_set(open_data_set(source), folder / "out", blocks=blocks, seed=1, resources=resources)
    assert bag(folder / "out") == bag(source)
    assert made.manifest.further.carried == tuple(sorted(further))
    assert open_data_set(folder / "out").manifest == made.manifest


def test_same_bytes_for_any_cores_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_data_set(make_typed_set(tmp_path / "a", 600, EVERY_TYPE, files=5))
    for cores in (1, 2, 5):
        limits = Resources(cores=cores, memory=1 << 30)
        shuffle_set(source, tmp_path / f"{cores}/out", blocks=3, seed=7, resources=limits)
    monkeypatch.setattr(passes, "MIN_BUCKET", 1 << 10)
    spilled: list[int] = []
    spill = scatter.Scatter.spill
    monkeypatch.setattr(scatter.Scatter, "spill", lambda self: (spilled.append(len(self.slices)), spill(self))[1])
    shuffle_set(source, tmp_path / "tiny/out", blocks=3, seed=7, resources=TINY)
    assert sum(spilled) > 10, "the capped run was meant to use the disk"
    expected = content(tmp_path / "1/out")
    assert all(content(tmp_path / name / "out") == expected for name in ("2", "5", "tiny"))


def test_mixing_repeats_rows_with_all_their_columns(tmp_path: Path) -> None:
    make_typed_set(tmp_path / "D/a", 40, EVERY_TYPE, files=3)
    make_typed_set(tmp_path / "D/b", 30, EVERY_TYPE[:2], first=100)
    run(shuffle_datasets, "-d", tmp_path / "D", "--mix", "a=2.5", "--mix", "b=0.5")
    known = bag(tmp_path / "D/a")
    found = bag(tmp_path / "D-sf/a-00000")
    assert found.keys() == known.keys()
    assert Counter(found.values()) == {2: 20, 3: 20}
    some = bag(tmp_path / "D-sf/b-00000")
    assert some <= bag(tmp_path / "D/b")
    assert some.total() == 15


def test_one_set_of_several_and_partitions(tmp_path: Path) -> None:
    make_typed_set(tmp_path / "D/a", 40, EVERY_TYPE, files=3)
    make_typed_set(tmp_path / "D/b", 30, EVERY_TYPE, files=2, first=100)
    before = bag(tmp_path / "D")
    run(shuffle_partition, "-d", tmp_path / "D", "-o", tmp_path / "E")
    assert bag(tmp_path / "E") == before
    dealing = run(repartition, "-d", tmp_path / "D", "-n", 2)
    assert bag(tmp_path / "D") == before
    dealt = open_data_set(tmp_path / "D")
    assert dealt.manifest.further.carried == tuple(sorted(EVERY_TYPE))
    assert verify(dealt) == []
    assert "warning: column" not in dealing.output
    run(shuffle_partition, "-d", tmp_path / "D", "-o", tmp_path / "F", "-n", 3)
    assert bag(tmp_path / "F") == before


def test_columns_of_some_files_are_left_out_by_name(tmp_path: Path) -> None:
    """In every command that rewrites rows; repartition, which moves files, keeps them."""
    make_typed_set(tmp_path / "D/a", 20, EVERY_TYPE, files=2)
    make_typed_set(tmp_path / "D/b", 10, EVERY_TYPE[1:], first=100)
    missing = EVERY_TYPE[0].name
    result = run(shuffle_partition, "-d", tmp_path / "D", "-o", tmp_path / "E")
    lines = [line for line in result.output.splitlines() if line.startswith("warning")]
    assert len(lines) == 1
    assert f"column {missing} is left out: it is in a/a-00000" in lines[0]
    assert "not in b/b-00000" in lines[0]
    manifest = read_manifest(tmp_path / "E/D-00000")
    assert manifest is not None
    assert [*manifest.to_json()["columns_left_out"]] == [missing]
    assert manifest.further.carried == tuple(sorted(EVERY_TYPE[1:]))
    without = [tuple(pair for pair in row if pair[0] != missing) for row in rows_of_folder(tmp_path / "D")]
    assert bag(tmp_path / "E") == Counter(without)
    before = bag(tmp_path / "D")
    dealt = run(repartition, "-d", tmp_path / "D", "-n", 1)
    assert f"warning: column {missing} is not the same in all sets: it is in a, not in b\n" in dealt.output
    assert bag(tmp_path / "D") == before
    assert [*open_data_set(tmp_path / "D").manifest.further.left_out] == [missing]


def test_without_further_columns_a_manifest_does_not_speak_of_them(tmp_path: Path) -> None:
    make_typed_set(tmp_path / "D/a", 20, ())
    run(shuffle_datasets, "-d", tmp_path / "D")
    text = (tmp_path / "D-sf/a-00000/_manifest.json").read_text(encoding="utf-8")
    assert "columns" not in text
