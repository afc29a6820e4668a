"""The shuffle is a uniform permutation, the same however it is computed, and nothing is lost."""

import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jllm.commands.shuffle_datasets import main as shuffle_datasets
from jllm.commands.shuffle_partition import main as shuffle_partition
from jllm.data.dataset.manifest import open_data_set, read_manifest
from jllm.data.shuffle import data_set as shuffle
from jllm.data.shuffle import passes, scatter
from jllm.data.shuffle.data_set import Resources, shuffle_set
from jllm.data.shuffle.layout import block_edges, destinations, lay_out
from jllm.errors import UserError
from tests.data.sets import content, make_set, row_numbers, table_of

SIZE = float(os.environ.get("JLLM_TEST_SIZE", "1"))
AMPLE = Resources(cores=2, memory=1 << 30)
EDGE_SIZES = (0, 1, 2, 7, 8, 9, 255, 256, 257)


def run(command: object, *args: object) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args])  # type: ignore[arg-type]


def out_of_core(monkeypatch: pytest.MonkeyPatch) -> Resources:
    """A cap that nothing fits under, with buckets of a few rows."""
    monkeypatch.setattr(passes, "MIN_BUCKET", 1 << 10)
    return Resources(cores=2, memory=8 << 10)


@pytest.mark.parametrize("rows", EDGE_SIZES)
@pytest.mark.parametrize("blocks", [1, 3])
def test_rows_are_kept_at_every_size(tmp_path: Path, rows: int, blocks: int) -> None:
    source = make_set(tmp_path / "a", rows, files=2)
    outcome = shuffle_set(open_data_set(source), tmp_path / "out", blocks=blocks, seed=1, resources=AMPLE)
    assert sorted(row_numbers(tmp_path / "out")) == list(range(rows))
    assert len(outcome.manifest.files) == blocks
    before, after = open_data_set(source).manifest, open_data_set(tmp_path / "out").manifest
    for name in ("rows", "tokens", "trained_tokens", "longest_row"):
        assert after.to_json()[name] == before.to_json()[name], name
    assert after.tokenizer == before.tokenizer
    assert after.sources == ({"name": "a", "fingerprint": before.fingerprint},)


def test_all_columns_travel_with_their_row(tmp_path: Path) -> None:
    source = make_set(tmp_path / "a", 300, files=3)
    shuffle_set(open_data_set(source), tmp_path / "out", blocks=2, seed=1, resources=AMPLE)
    before = {row["input_ids"][0]: row for row in table_of(source).to_pylist()}
    after = table_of(tmp_path / "out").to_pylist()
    assert len(after) == 300
    assert all(before[row["input_ids"][0]] == row for row in after)


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


@given(rows=st.integers(0, 5000), seed=st.integers(0, 2**64))
@settings(max_examples=int(100 * SIZE), deadline=None)
def test_destinations_are_a_permutation(rows: int, seed: int) -> None:
    to = destinations(rows, fingerprint="ab" * 32, seed=seed)
    assert np.array_equal(np.sort(to), np.arange(rows))


def test_every_position_is_equally_likely() -> None:
    """Chi-square over 200 seeds, for the position of every row: 8 × 8 cells, 200/8 expected in each."""
    rows, seeds = 8, 200
    counts = np.zeros((rows, rows))
    for seed in range(seeds):
        counts[np.arange(rows), destinations(rows, fingerprint="cd" * 32, seed=seed)] += 1
    expected = seeds / rows
    statistic = ((counts - expected) ** 2 / expected).sum()
    # (rows - 1)^2 = 49 degrees of freedom: mean 49, standard deviation 9.9; five of them each way.
    assert 49 - 5 * 9.9 < statistic < 49 + 5 * 9.9


@given(rows=st.integers(0, 400), blocks=st.integers(1, 20), rows_per_bucket=st.integers(1, 100))
@settings(max_examples=int(300 * SIZE), deadline=None)
def test_layout_covers_every_block_once(rows: int, blocks: int, rows_per_bucket: int) -> None:
    edges = block_edges(rows, blocks)
    layout = lay_out(edges, rows_per_bucket)
    assert [block for unit in layout.units for block in unit.blocks] == list(range(blocks))
    assert [bucket for unit in layout.units for bucket in unit.buckets] == list(range(len(layout.bounds)))
    ends = [*layout.bounds[1:].tolist(), rows]
    assert all(end - start <= rows_per_bucket for start, end in zip(layout.bounds.tolist(), ends, strict=True))
    for unit in layout.units:
        assert layout.bounds[unit.buckets.start] == edges[unit.blocks.start]
        assert len(unit.blocks) == 1 or len(unit.buckets) == 1


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


def test_command_shuffles_every_set(tmp_path: Path) -> None:
    make_set(tmp_path / "D/a", 50, files=3)
    make_set(tmp_path / "D/b", 20, files=2, first=1000)
    result = run(shuffle_datasets, "-d", tmp_path / "D", "--cores", 2)
    assert result.exit_code == 0, result.output
    assert sorted(path.relative_to(tmp_path / "D-sf").as_posix() for path in (tmp_path / "D-sf").rglob("*.*")) == [
        *["a-00000/_manifest.json"],
        *[f"a-00000/a-00000-0000{k}.zstd.parquet" for k in range(3)],
        *["b-00000/_manifest.json"],
        *[f"b-00000/b-00000-0000{k}.zstd.parquet" for k in range(2)],
    ]
    assert row_numbers(tmp_path / "D-sf/a-00000") != list(range(50))
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "D-sf").rglob("*.parquet")}
    again = run(shuffle_datasets, "-d", tmp_path / "D", "--cores", 1)
    assert again.exit_code == 0
    assert again.output.count("already shuffled") == 2
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "D-sf").rglob("*.parquet")}


def test_other_options_are_refused_until_clean(tmp_path: Path) -> None:
    make_set(tmp_path / "D/a", 50, files=3)
    assert run(shuffle_datasets, "-d", tmp_path / "D").exit_code == 0
    refused = run(shuffle_datasets, "-d", tmp_path / "D", "--seed", 2)
    assert refused.exit_code == 2
    assert "--clean" in refused.stderr
    assert refused.stderr.count("\n") == 1
    cleaned = run(shuffle_datasets, "-d", tmp_path / "D", "--seed", 2, "-n", 2, "-C")
    assert cleaned.exit_code == 0, cleaned.output
    manifest = read_manifest(tmp_path / "D-sf/a-00000")
    assert manifest is not None
    assert manifest.options == {"seed": 2, "blocks": 2}


def test_foreign_output_folder_is_never_touched(tmp_path: Path) -> None:
    make_set(tmp_path / "D/a", 5)
    (tmp_path / "D-sf/a-00000").mkdir(parents=True)
    (tmp_path / "D-sf/a-00000/thesis.txt").write_text("mine")
    for flag in ([], ["-C"]):
        refused = run(shuffle_datasets, "-d", tmp_path / "D", *flag)
        assert refused.exit_code == 2
        assert "not empty" in refused.stderr
    assert (tmp_path / "D-sf/a-00000/thesis.txt").read_text() == "mine"


def test_a_killed_clean_up_can_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_set(tmp_path / "D/a", 50, files=3)
    assert run(shuffle_datasets, "-d", tmp_path / "D").exit_code == 0
    expected = content(tmp_path / "D-sf")

    class Killed(BaseException):
        pass

    unlink = Path.unlink
    for at in range(5):
        left = [at]

        def mortal(path: Path, missing_ok: bool = False, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            unlink(path, missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", mortal)
            with pytest.raises(Killed):
                shuffle.clean(tmp_path / "D-sf/a-00000")
        assert run(shuffle_datasets, "-d", tmp_path / "D", "-C").exit_code == 0
        assert content(tmp_path / "D-sf") == expected


def test_missing_output_is_noticed(tmp_path: Path) -> None:
    make_set(tmp_path / "D/a", 50, files=3)
    assert run(shuffle_datasets, "-d", tmp_path / "D").exit_code == 0
    next((tmp_path / "D-sf").rglob("*-00001.zstd.parquet")).unlink()
    result = run(shuffle_datasets, "-d", tmp_path / "D")
    assert result.exit_code == 2
    assert "listed in the manifest and not there" in result.stderr


def test_a_second_run_at_the_same_time_is_refused(tmp_path: Path) -> None:
    source = open_data_set(make_set(tmp_path / "a", 50, files=3))
    plan = {"fingerprint": source.manifest.fingerprint, "seed": 1, "blocks": 2}
    with (
        shuffle._held(tmp_path / "out", plan),
        pytest.raises(UserError, match="another run"),
    ):
        shuffle_set(source, tmp_path / "out", blocks=2, seed=1, resources=AMPLE)
    shuffle_set(source, tmp_path / "out", blocks=2, seed=1, resources=AMPLE)


def test_an_empty_data_set(tmp_path: Path) -> None:
    make_set(tmp_path / "D/a", 0, files=0)
    result = run(shuffle_datasets, "-d", tmp_path / "D")
    assert result.exit_code == 0, result.output
    assert open_data_set(tmp_path / "D-sf/a-00000").manifest.rows == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-n", "0"], "--num_block 0"),
        (["--memory", "lots"], "--memory lots"),
        (["--mem_rate", "2"], "--mem_rate"),
        (["--cores", "0"], "--cores 0"),
        (["-o", "D/inside"], "beside it"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_set(tmp_path / "D/a", 5)
    result = run(shuffle_datasets, "-d", "D", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_too_small_a_disk_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_set(tmp_path / "D/a", 50, files=3)
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and _Usage())
    result = run(shuffle_datasets, "-d", tmp_path / "D")
    assert result.exit_code == 2
    assert "of disk" in result.stderr
    assert not (tmp_path / "D-sf").exists(), "not a byte was written"


class _Usage:
    free = 1000


def test_damaged_input_names_the_file(tmp_path: Path) -> None:
    make_set(tmp_path / "D/a", 5000, files=2)
    path = tmp_path / "D/a/a-00000/a-00000-00001.zstd.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    result = run(shuffle_datasets, "-d", tmp_path / "D")
    assert result.exit_code == 2
    assert path.name in result.stderr
    assert result.stderr.count("\n") == 1


def test_shuffle_partition_mixes_sets(tmp_path: Path) -> None:
    make_set(tmp_path / "D/a", 500, files=3)
    make_set(tmp_path / "D/b", 500, files=2, first=500)
    result = run(shuffle_partition, "-d", tmp_path / "D", "-o", tmp_path / "E")
    assert result.exit_code == 0, result.output
    rows = row_numbers(tmp_path / "E/D-00000")
    assert sorted(rows) == list(range(1000))
    assert 150 < sum(number < 500 for number in rows[:500]) < 350
    assert len(list((tmp_path / "E").rglob("*.parquet"))) == 5
