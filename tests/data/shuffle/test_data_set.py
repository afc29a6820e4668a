"""A data set is shuffled whole, into a folder that is its own, and what was done is kept."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from jllm.commands.shuffle_datasets import main as shuffle_datasets
from jllm.data.dataset.manifest import open_data_set
from jllm.data.shuffle import data_set as shuffle
from jllm.data.shuffle.data_set import Resources, shuffle_set
from jllm.errors import UserError
from tests.data.sets import content, make_set, row_numbers, table_of

AMPLE = Resources(cores=2, memory=1 << 30)
EDGE_SIZES = (0, 1, 2, 7, 8, 9, 255, 256, 257)


def run(command: object, *args: object) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args])  # type: ignore[arg-type]


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


def test_clean_removes_what_is_ours_and_the_run_goes_on(tmp_path: Path) -> None:
    """Files of others stay, whatever they are called, and do not keep the next run from beginning there."""
    make_set(tmp_path / "D/a", 50, files=3)
    words = ("-d", tmp_path / "D")
    assert run(shuffle_datasets, *words).exit_code == 0
    made, folder = content(tmp_path / "D-sf"), tmp_path / "D-sf/a-00000"
    strays = {name: name.encode() for name in ("notes.txt", ".mine.json", "a-00000-mine.parquet", "more/a.parquet")}
    (folder / "more").mkdir()
    for name, data in strays.items():
        (folder / name).write_bytes(data)
    for seed in (2, 1234):
        cleaned = run(shuffle_datasets, *words, "--seed", seed, "-C")
        assert cleaned.exit_code == 0, cleaned.stderr
        assert {name: (folder / name).read_bytes() for name in strays} == strays
    assert content(tmp_path / "D-sf") == {**made, **{f"a-00000/{name}": data for name, data in strays.items()}}
    shuffle.clean(folder)
    assert {name for name in content(folder) if name != shuffle.PLAN_NAME} == set(strays)
    again = run(shuffle_datasets, *words)  # without -C too, for nothing of ours is there
    assert again.exit_code == 0, again.stderr


def test_clean_refuses_a_folder_where_a_run_is_at_work(tmp_path: Path) -> None:
    make_set(tmp_path / "D/a", 50, files=3)
    folder = tmp_path / "D-sf/a-00000"
    with shuffle._held(folder, {"seed": 1}):
        (folder / "a-00000-00000.zstd.parquet").write_bytes(b"half a block")
        before = content(folder)
        refused = run(shuffle_datasets, "-d", tmp_path / "D", "-C")
        assert refused.exit_code == 2
        assert "another run is at work there" in refused.stderr
        assert content(folder) == before


def test_a_second_run_at_the_same_time_is_refused(tmp_path: Path) -> None:
    source = open_data_set(make_set(tmp_path / "a", 50, files=3))
    plan = {"fingerprint": source.manifest.fingerprint, "seed": 1, "blocks": 2}
    with (
        shuffle._held(tmp_path / "out", plan),
        pytest.raises(UserError, match="another run"),
    ):
        shuffle_set(source, tmp_path / "out", blocks=2, seed=1, resources=AMPLE)
    shuffle_set(source, tmp_path / "out", blocks=2, seed=1, resources=AMPLE)
