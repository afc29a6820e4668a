"""Mixtures hold exactly what was asked for, and say so."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from jllm.commands.shuffle_datasets import main
from jllm.data.dataset.manifest import open_data_set, read_manifest
from jllm.data.shuffle.mix import Recipe, row_lengths, row_sources, select_rows
from jllm.errors import UserError
from tests.data.sets import content, make_set, row_numbers, table_of


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def two_sets(folder: Path) -> Path:
    make_set(folder / "a", 100, files=3)
    make_set(folder / "b", 40, files=2, first=1000)
    return folder


def counts(folder: Path) -> Counter[int]:
    """How often each row number occurs in a shuffled set."""
    return Counter(row_numbers(folder))


def how_often(folder: Path) -> Counter[int]:
    """How many rows occur once, twice, ..."""
    return Counter(counts(folder).values())


def lengths(numbers: Counter[int]) -> int:
    return sum((2 + number % 5) * times for number, times in numbers.items())


def test_whole_repeats_and_a_seeded_fraction(tmp_path: Path) -> None:
    two_sets(tmp_path / "D")
    result = run("-d", tmp_path / "D", "--mix", "a=2.5", "--mix", "b=0.25")
    assert result.exit_code == 0, result.output
    assert how_often(tmp_path / "D-sf/a-00000") == {2: 50, 3: 50}
    assert how_often(tmp_path / "D-sf/b-00000") == {1: 10}
    other = run("-d", tmp_path / "D", "-o", tmp_path / "E", "--mix", "a=2.5", "--mix", "b=0.25", "--seed", 2)
    assert other.exit_code == 0
    assert counts(tmp_path / "E/b-00000") != counts(tmp_path / "D-sf/b-00000"), "another seed, another quarter"


def test_all_columns_travel_with_repeated_rows(tmp_path: Path) -> None:
    make_set(tmp_path / "D/a", 30, files=2)
    assert run("-d", tmp_path / "D", "--mix", "a=3").exit_code == 0
    manifest = open_data_set(tmp_path / "D-sf").manifest
    before = open_data_set(tmp_path / "D/a").manifest
    for name in ("rows", "tokens", "trained_tokens"):
        assert manifest.total(name) == 3 * (before.total(name) or 0), name


def test_the_outcome_is_printed_and_recorded(tmp_path: Path) -> None:
    two_sets(tmp_path / "D")
    result = run("-d", tmp_path / "D", "--mix", "a=1", "--mix", "b=2.5")
    assert result.exit_code == 0
    assert "50.0 %" in result.output
    for name in ("a", "b"):
        manifest = read_manifest(tmp_path / f"D-sf/{name}-00000")
        assert manifest is not None
        facts = manifest.extra["mix"]
        assert facts["rows"] == manifest.rows == 100
        assert facts["tokens"] == manifest.total("tokens")
        assert facts["share_of_rows"] == 0.5
    again = run("-d", tmp_path / "D", "--mix", "a=1", "--mix", "b=2.5")
    assert again.output.count("already shuffled") == 2


def test_shares_of_rows(tmp_path: Path) -> None:
    two_sets(tmp_path / "D")
    result = run("-d", tmp_path / "D", "--mix", "a=2", "--mix", "b=1", "--mix_by", "rows", "--mix_total", "10k".upper())
    assert result.exit_code == 0, result.output
    rows = {name: sum(counts(tmp_path / f"D-sf/{name}-00000").values()) for name in ("a", "b")}
    assert rows["a"] / rows["b"] == pytest.approx(2, rel=0.001)
    assert sum(rows.values()) == pytest.approx(10_000, abs=2)


def test_shares_without_a_total_repeat_nothing(tmp_path: Path) -> None:
    two_sets(tmp_path / "D")
    assert run("-d", tmp_path / "D", "--mix", "a=2", "--mix", "b=1", "--mix_by", "rows").exit_code == 0
    assert how_often(tmp_path / "D-sf/a-00000") == {1: 80}
    assert how_often(tmp_path / "D-sf/b-00000") == {1: 40}


def test_shares_of_tokens(tmp_path: Path) -> None:
    make_set(tmp_path / "D/a", 400, files=2, longest=3)
    make_set(tmp_path / "D/b", 400, files=2, longest=20)
    result = run("-d", tmp_path / "D", "--mix", "a=2", "--mix", "b=1", "--mix_by", "tokens", "--mix_total", "3000")
    assert result.exit_code == 0, result.output
    tokens = [open_data_set(tmp_path / f"D-sf/{name}-00000").manifest.total("tokens") or 0 for name in ("a", "b")]
    assert tokens[0] / tokens[1] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("cap", [0.3, 0.999, 1.7, 2.4])
def test_max_tokens_is_met_to_the_row(tmp_path: Path, cap: float) -> None:
    make_set(tmp_path / "D/a", 100, files=3)
    whole = open_data_set(tmp_path / "D/a").manifest.total("tokens") or 0
    limit = int(cap * whole)
    assert run("-d", tmp_path / "D", "--mix", "a=3", "--max_tokens", f"a={limit}").exit_code == 0
    taken = lengths(counts(tmp_path / "D-sf/a-00000"))
    assert limit - 6 < taken <= limit
    assert max(how_often(tmp_path / "D-sf/a-00000")) <= int(cap) + 1
    assert run("-d", tmp_path / "D", "-o", tmp_path / "E", "--max_tokens", 10 * whole).exit_code == 0
    assert how_often(tmp_path / "E/a-00000") == {1: 100}


def test_the_next_row_would_exceed_the_cap(tmp_path: Path) -> None:
    data_set = open_data_set(make_set(tmp_path / "a", 50, files=2))
    sizes = row_lengths(data_set, cores=1)
    chosen = select_rows(data_set, Recipe(rate=1.0, max_tokens=100), seed=3, cores=1).copies
    more = select_rows(data_set, Recipe(rate=1.0, max_tokens=107), seed=3, cores=1).copies
    assert chosen is not None
    assert more is not None
    assert (sizes * chosen).sum() <= 100
    added = (more > chosen).nonzero()[0]
    assert len(added), "a larger cap takes more"
    assert (sizes * chosen).sum() + sizes[added].max() > 100


def test_subsample_then_repeat(tmp_path: Path) -> None:
    two_sets(tmp_path / "D")
    (tmp_path / "mix.toml").write_text(
        "[sets]\nb = 0\n[sets.a]\nweight = 2\nsubsample = 0.333\nmax_rows = 1000\n", encoding="utf-8"
    )
    result = run("-d", tmp_path / "D", "--mix", tmp_path / "mix.toml")
    assert result.exit_code == 0, result.output
    assert how_often(tmp_path / "D-sf/a-00000") == {2: 33}
    assert not (tmp_path / "D-sf/b-00000").exists()
    assert "b: left out" in result.output


def test_max_rows(tmp_path: Path) -> None:
    two_sets(tmp_path / "D")
    (tmp_path / "mix.toml").write_text("[sets.a]\nmax_rows = 7\n", encoding="utf-8")
    assert run("-d", tmp_path / "D", "--mix", tmp_path / "mix.toml", "--mix", "b=1").exit_code == 0
    assert how_often(tmp_path / "D-sf/a-00000") == {1: 7}
    assert how_often(tmp_path / "D-sf/b-00000") == {1: 40}


def tagged(folder: Path) -> Path:
    path = folder / "web/part-0.parquet"
    path.parent.mkdir(parents=True)
    rows = pa.array([[number, 1, 1] for number in range(100)], pa.list_(pa.int32()))
    sources = pa.array(["good" if number < 40 else "poor" if number < 90 else None for number in range(100)])
    pq.write_table(pa.table({"input_ids": rows, "source": sources}), path, row_group_size=30)
    return folder


def test_weights_by_source_tag(tmp_path: Path) -> None:
    tagged(tmp_path / "D")
    arguments = ("--mix", "source:good=2.5", "--mix", "source:poor=0.5", "--mix", "source:odd=3")
    result = run("-d", tmp_path / "D", *arguments)
    assert result.exit_code == 0, result.output
    taken = counts(tmp_path / "D-sf/web-00000")
    assert Counter(taken[number] for number in range(40)) == {2: 20, 3: 20}
    assert Counter(taken[number] for number in range(40, 90)) == {0: 25, 1: 25}
    assert all(taken[number] == 1 for number in range(90, 100)), "rows without a tag are taken once"
    assert 'no row has the source "odd"' in result.output


def test_output_does_not_depend_on_cores(tmp_path: Path) -> None:
    tagged(tmp_path / "D")
    for cores in (1, 2):
        arguments = ("--mix", "source:good=2.5", "--max_tokens", 300, "--cores", cores)
        assert run("-d", tmp_path / "D", "-o", tmp_path / str(cores), *arguments).exit_code == 0
    assert content(tmp_path / "1") == content(tmp_path / "2")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mix", "A=2"], 'no data set "A"; there are: a, b.'),
        (["--mix", "a=much"], "must be a number"),
        (["--mix", "a=-1"], "give 0"),
        (["--mix", "a=0", "--mix", "b=0"], "every weight is 0"),
        (["--mix", "absent.toml"], "absent.toml"),
        (["--mix", "a=1", "--mix_by", "rows"], "no share for b"),
        (["--mix", "a=1", "--mix_total", "5"], "--mix_by"),
        (["--max_tokens", "few"], "few"),
        (["--mix", "bad.toml"], 'unknown key "set"; known: by, total, sets, sources. Did you mean "sets"?'),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    two_sets(tmp_path / "D")
    (tmp_path / "bad.toml").write_text("[set]\na = 1\n", encoding="utf-8")
    result = run("-d", "D", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "D-sf").exists()


def test_tags_of_any_kind_of_text(tmp_path: Path) -> None:
    """And no tag where there is no column, or null; what is no text is refused by name."""
    rows = pa.array([[1]] * 3, pa.list_(pa.int32()))
    tags = pa.array(["a", None, "b"])
    for name, column in {"0": tags, "1": tags.dictionary_encode(), "2": tags.cast(pa.large_string())}.items():
        pq.write_table(pa.table({"input_ids": rows, "source": column}), tmp_path / f"{name}.parquet")
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "3.parquet")
    assert row_sources(open_data_set(tmp_path)).tolist() == [*(["a", "", "b"] * 3), *([""] * 3)]
    pq.write_table(pa.table({"input_ids": rows, "source": pa.array([1, 2, 3])}), tmp_path / "4.parquet")
    with pytest.raises(UserError, match=r"4\.parquet: column source is int64; it must be text to be mixed by"):
        row_sources(open_data_set(tmp_path))


def test_tags_travel(tmp_path: Path) -> None:
    tagged(tmp_path / "D")
    assert run("-d", tmp_path / "D", "--mix", "source:good=1").exit_code == 0
    tags = Counter(table_of(tmp_path / "D-sf").column("source").to_pylist())
    assert tags == {"good": 40, "poor": 50, "": 10}
