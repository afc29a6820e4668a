"""One dataclass gives flags, TOML keys, defaults and help; mistakes name the option, the value and the way out."""

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.commands.inspect import InspectConfig
from jllm.commands.manifest import ManifestConfig
from jllm.commands.repartition import RepartitionConfig
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.shuffle.config import ShuffleConfig
from jllm.errors import UserError
from jllm.options import (
    as_arguments,
    check_ranges,
    command,
    describe_differences,
    differences,
    option,
    read_toml,
    value_type,
)
from jllm.ranges import MOST_INT
from jllm.train.config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    source: tuple[Path, ...] = option(dataclasses.MISSING, "-i", group="Input", help="where from")
    number: int = option(3, "-n", help="how many")
    rate: float = option(0.5, help="how fast")
    name: str | None = option(None, help="what it is called")
    kind: str = option("a", group="Manner", help="which kind", choices=("a", "b"))
    loud: bool = option(False, "-l", help="tell more")
    quick: bool = option(True, help="hurry")
    config: Path | None = option(None, help="TOML file")

    def __post_init__(self) -> None:
        if self.number < 1:
            raise UserError(f"--number {self.number}: it must be at least 1")


def parse(*arguments: str) -> Example:
    """What a command made from `Example` gets for these arguments."""
    seen: list[Example] = []

    @command(Example, name="example")
    def main(config: Example) -> None:
        seen.append(config)

    main(list(arguments))
    return seen[0]


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The single line that these arguments end with."""
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    return captured.err


def toml(folder: Path, text: str) -> str:
    path = folder / "options.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_and_types() -> None:
    config = parse("-i", "x", "-i", "y")
    assert config == Example(source=(Path("x"), Path("y")))
    assert isinstance(config.source[0], Path)
    config = parse("-i", "x", "-n", "7", "--rate", "2", "--name", "n", "--kind", "b", "-l", "--no_quick")
    assert config == Example(
        source=(Path("x"),), number=7, rate=2.0, name="n", kind="b", loud=True, quick=False, config=None
    )


def test_dashes_and_underscores_in_flags_are_the_same() -> None:
    assert parse("-i", "x", "--no-quick").quick is False


def test_toml_gives_values_alone_or_in_tables_and_flags_win(tmp_path: Path) -> None:
    path = toml(tmp_path, 'source = ["x", "y"]\nrate = 1\n[more]\nnumber = 9\nloud = true\nquick = false\n')
    assert parse("--config", path) == Example(
        source=(Path("x"), Path("y")), rate=1.0, number=9, loud=True, quick=False, config=Path(path)
    )
    config = parse("--config", path, "-n", "2", "--no_loud", "-i", "z")
    assert (config.number, config.loud, config.source) == (2, False, (Path("z"),))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nunber = 3", ['unknown key "nunber"', 'Did you mean "number"?']),
        ("[table]\nnunber = 3", ['unknown key "nunber"']),
        ("number = 3\n[table]\nnumber = 4", ['"number" is given twice']),
        ('number = "3"', ["number = '3' is not int"]),
        ("number = true", ["number = True is not int"]),
        ("number = 1.5", ["number = 1.5 is not int"]),
        ('loud = "false"', ["loud = 'false' is not true or false"]),
        ("name = 3", ["name = 3 is not text in quotes"]),
        ("kind = 'c'", ["c", "a", "b"]),
        ("number = 0", ["--number 0", "at least 1"]),
        ("number =", ["not valid TOML"]),
    ],
)
def test_mistakes_in_toml(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: list[str]) -> None:
    line = mistake(capsys, "-i", "x", "--config", toml(tmp_path, text))
    for words in expected:
        assert words in line


def test_missing_toml_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.toml: No such file" in mistake(capsys, "-i", "x", "--config", "nowhere.toml")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--source"),
        (["-i", "x", "--number", "many"], "'many' is not a valid integer"),
        (["-i", "x", "--kind", "c"], "'c' is not one of 'a', 'b'"),
        (["-i", "x", "--number", "0"], "--number 0: it must be at least 1"),
        (["-i", "x", "--nunber", "1"], "--number"),
        (["-i", "x", "stray"], "stray"),
    ],
)
def test_mistakes_in_flags(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    assert expected in mistake(capsys, *arguments)


def test_help_shows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    @command(Example, name="example")
    def main(config: Example) -> None:
        raise AssertionError("help runs nothing")

    main(["-h"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Example):
        assert f"--{field.name}" in shown
        assert field.metadata["option"].help in shown
    assert "[default: 3]" in shown


def test_help_has_groups_and_shows_a_no_only_where_it_says_something(capsys: pytest.CaptureFixture[str]) -> None:
    @command(Example, name="example")
    def main(config: Example) -> None:
        raise AssertionError("help runs nothing")

    main(["-h"])
    lines = capsys.readouterr().out.splitlines()
    groups: dict[str, set[str]] = {}
    for line in lines[1:]:
        if line.endswith(":") and not line.startswith(" "):
            found = groups.setdefault(line[:-1], set())
        elif line.strip().startswith("-"):
            found |= {word.strip(",") for word in line.split() if word.startswith("--")}
    assert groups == {
        "Input": {"--source", "--number", "--rate", "--name"},
        "Manner": {"--kind", "--loud", "--quick", "--no_quick", "--config", "--version", "--help"},
    }
    assert parse("-i", "x", "-l", "--no_loud").loud is False  # still there


WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8)


@settings(max_examples=100, deadline=None)
@given(
    source=st.lists(WORDS.filter(bool).map(Path), min_size=1, max_size=3),
    number=st.integers(1, 2**62),
    rate=st.floats(0, 2.0**62),
    name=st.none() | WORDS,
    kind=st.sampled_from("ab"),
    loud=st.booleans(),
    quick=st.booleans(),
)
def test_what_differs_from_the_defaults_gives_the_same_config(source: list[Path], **given: Any) -> None:
    config = Example(source=tuple(source), **given)
    assert parse(*as_arguments(config)) == config
    found = differences(config)
    assert all(value != getattr(Example, name, None) for name, value in found.items())
    lines = describe_differences(config)
    assert len(lines) == 1 + len(found)
    assert not any("\n" in line for line in lines)
    assert all(name in line for name, line in zip(found, lines[1:], strict=True))


def test_defaults_are_said() -> None:
    assert describe_differences(Example(source=(Path("x"),), rate=2.0, quick=False)) == [
        "options that differ from the defaults:",
        "  --source  x",
        "  --rate    2.0  (default: 0.5)",
        "  --no_quick",
    ]


def test_hidden_options_are_no_toml_keys(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Hidden:
        secret: int = option(0, help="set by a launcher", hidden=True)
        config: Path | None = option(None, help="TOML file")

    config_type: type[Any] = Hidden
    with pytest.raises(UserError, match='unknown key "secret"'):
        read_toml(Path(toml(tmp_path, "secret = 1")), config_type)


@pytest.mark.parametrize("given", ["--numbr", "--Number", "--nu_mber", "--num-ber=3"])
def test_the_nearest_option_is_offered_first(capsys: pytest.CaptureFixture[str], given: str) -> None:
    assert 'Did you mean "--number"?' in mistake(capsys, "-i", "x", given)


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**31])
def test_numbers_beyond_64_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int) -> None:
    assert "beyond 64 bits" in mistake(capsys, "-i", "x", f"--number={number}")
    assert "beyond 64 bits" in mistake(capsys, "-i", "x", "--config", toml(tmp_path, f"number = {number}"))


@pytest.mark.parametrize(
    "error", [PermissionError(13, "x", "the/path"), MemoryError(), OSError(28, "No space", "a\x1bb")]
)
def test_what_the_machine_refuses_is_one_line(capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    @command(Example, name="example")
    def main(config: Example) -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        main(["-i", "x"])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert "\x1b" not in err


CONFIGS: dict[type[Any], dict[str, Any]] = {
    TrainConfig: {"model": Path("m"), "train_data": ("d",)},
    Raw2IdsConfig: {"input": ("i",), "output": Path("o"), "tokenizer": "t"},
    ShuffleConfig: {"data": Path("d")},
    InspectConfig: {"folder": Path("f")},
    ManifestConfig: {"folder": Path("f")},
    RepartitionConfig: {"data": Path("d")},
}
"""The config classes with numbers among their options, and what they need beside."""
ODD = ("nan", "inf", "-inf", "-1", "1e30", "-1e30", "1.5", str(MOST_INT), str(10**31), "1e-30", "-0.0")


def numeric_options() -> list[tuple[type[Any], str, type]]:
    found = []
    for config_type in CONFIGS:
        hints = typing.get_type_hints(config_type)
        for field in dataclasses.fields(config_type):
            scalar = value_type(hints[field.name])[0]
            if scalar in (int, float):
                found.append((config_type, field.name, scalar))
    return found


@pytest.mark.parametrize(
    ("config_type", "name", "scalar"), numeric_options(), ids=lambda value: getattr(value, "__name__", value)
)
def test_every_number_has_a_range(
    capsys: pytest.CaptureFixture[str], config_type: type[Any], name: str, scalar: type
) -> None:
    """Whatever is given, a command gets a number inside the range, or says one line with the option in it."""
    base = [word for key, value in CONFIGS[config_type].items() for word in _words(config_type, key, value)]
    facts = next(field for field in dataclasses.fields(config_type) if field.name == name).metadata["option"]
    for text in ODD:
        seen: list[Any] = []
        code = 0
        try:
            command(config_type, name="x")(seen.append).main([*base, f"--{name}", text])
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr().err
        if code == 0:
            value = getattr(seen[0], name)
            assert math.isfinite(value)
            assert facts.range.mistake(name, value) is None
            assert type(value) is scalar
        else:
            assert (code, len(said.splitlines())) == (2, 1), said
            assert f"--{name}" in said
        assert code == 2 or text not in ("nan", "inf", "-inf", str(10**31))


def _words(config_type: type[Any], key: str, value: Any) -> list[str]:
    facts = next(field for field in dataclasses.fields(config_type) if field.name == key).metadata["option"]
    values = [str(each) for each in (value if isinstance(value, tuple) else (value,))]
    return values if facts.positional else [word for each in values for word in (f"--{key}", each)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranges:
    plain: float = option(1.0, help="without a range of its own")
    share: float = option(0.5, most=1, above_least=True, below_most=True, help="between two ends")
    steps: float = option(0.0, whole_from_1=True, help="a share, or whole")
    several: tuple[int, ...] = option((), least=2, most=4, help="may be repeated")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"plain": -1}, "--plain -1: it must be at least 0"),
        ({"plain": math.nan}, "--plain nan: give a finite number, at least 0"),
        ({"share": 0.0}, "--share 0.0: it must be above 0"),
        ({"share": 1.0}, "--share 1.0: it must be below 1"),
        ({"share": math.inf}, "--share inf: give a finite number, above 0 and below 1"),
        ({"steps": 1.5}, "--steps 1.5: give a share below 1, or a whole number from 1 on"),
        ({"several": (3, 1)}, "--several 1: it must be at least 2"),
        ({"several": (5,)}, "--several 5: it must be at most 4"),
    ],
)
def test_what_is_outside_a_range(values: dict[str, Any], said: str) -> None:
    """An option that says nothing of its range is at least 0 and finite."""
    with pytest.raises(UserError) as refused:
        check_ranges(Ranges(**values))
    assert str(refused.value) == said
    check_ranges(Ranges(steps=2.0, several=(2, 4), share=0.1))
