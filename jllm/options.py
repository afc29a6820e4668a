"""Options, declared once: a frozen dataclass is the config, its command-line flags, its TOML keys and its help text.

    @dataclass(frozen=True, kw_only=True)
    class ShuffleConfig:
        seed: int = option(1234, help="seed of the permutation")

    @command(ShuffleConfig, name="shuffle_datasets")
    def main(config: ShuffleConfig) -> None:
        "Shuffle data sets globally."

A field's type decides how its value is read: `str`, `int`, `float`, `Path`, `bool` (a flag; `--no_x` turns it off),
each also `| None`, and `tuple[T, ...]` (the option may be repeated). `--config FILE` reads TOML whose keys are field
names, alone or in tables; flags win over it. Underscores and dashes in flags are the same.

The range of a number stands with its option; where none is given it is at least 0 and finite, so that no option can
forget it. Every command refuses what is outside, and so does `check_ranges` for a config that Python code makes. Checks
that concern more than one option belong in the dataclass's `__post_init__`, which raises `UserError`.

A user's mistake is one line on standard error and exit code 2, and so is what a file system refuses, or memory that is
not there. Only click and the standard library are imported here, so that `--help` is fast.

`--help` shows options in groups: `option(..., group="Data")` begins one, and the fields after it belong to it too.
`--no_x` is shown where a flag is on by default. `differences` is what a config has that is not a default, for dry runs.
"""

import copy
import dataclasses
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from jllm import __version__
from jllm.errors import EXIT_CODE, UserError, did_you_mean, of_file_system, printable, report, say
from jllm.guards import notation
from jllm.ranges import LEAST_INT, MOST_INT, ValueRange

Config = TypeVar("Config")
CONTEXT_SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
    "token_normalize_func": lambda name: name.replace("-", "_"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptionFacts:
    """What a flag needs beyond the field's name, type and default."""

    flags: tuple[str, ...]
    help: str
    choices: tuple[str, ...] | None
    metavar: str | None
    hidden: bool
    positional: bool
    range: ValueRange
    group: str | None = None
    may_differ: bool = False


def option(
    default: Any = dataclasses.MISSING,
    *flags: str,
    help: str,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    hidden: bool = False,
    positional: bool = False,
    group: str | None = None,
    may_differ: bool = False,
    least: float = 0,
    most: float = MOST_INT,
    above_least: bool = False,
    below_most: bool = False,
    whole_from_1: bool = False,
) -> Any:
    """A dataclass field that is also an option.

    Args:
        default: the field's default; leave it out for a required option.
        flags: names beside `--<field name>`, such as "-i".
        help: one or two sentences, for `--help`.
        choices: the allowed values, where they are few.
        metavar: how the value is shown in `--help`.
        hidden: not shown in `--help`.
        positional: given without a flag, by its place.
        group: the heading in `--help` that this option and those after it stand under, up to the next with a group.
        may_differ: between the nodes of one run; options of other commands have no nodes.
        least, most, above_least, below_most, whole_from_1: of a number, as in `ValueRange`.
    """
    facts = OptionFacts(
        flags=flags,
        help=help,
        choices=tuple(choices) if choices else None,
        metavar=metavar,
        hidden=hidden,
        positional=positional,
        group=group,
        may_differ=may_differ,
        range=ValueRange(
            least=least, most=most, above_least=above_least, below_most=below_most, whole_from_1=whole_from_1
        ),
    )
    return dataclasses.field(default=default, metadata={"option": facts})


class _OneLineErrors(click.Command):
    """Turns a user's mistake into one line and exit code 2, for a command and for a group of them."""

    refusal: Callable[[str], None] = staticmethod(report)

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> Any:
        extra["standalone_mode"] = False
        try:
            return super().main(args=args, prog_name=prog_name, **extra)
        except click.exceptions.Exit as exit_request:
            sys.exit(exit_request.exit_code)
        except (click.Abort, KeyboardInterrupt):
            say("interrupted", file=sys.stderr, flush=True)
            sys.exit(130)
        except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except click.NoSuchOption as error:
            self._refuse(f"{error.message.rstrip('.')}{_nearest_option(error)}")
        except click.ClickException as error:
            self._refuse(error.format_message())
        except UserError as error:
            self._refuse(str(error))
        except (OSError, RuntimeError) as error:
            mistake = of_file_system(error)
            if mistake is None:
                raise
            self._refuse(str(mistake))
        except MemoryError as error:
            self._refuse(
                f"the memory does not suffice ({error or 'out of memory'}); give smaller sizes, or a larger machine"
            )

    def _refuse(self, message: str) -> typing.NoReturn:
        self.refusal(message)
        sys.exit(EXIT_CODE)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        return super().make_context(*args, **{**CONTEXT_SETTINGS, **kwargs})


def _nearest_option(error: click.NoSuchOption) -> str:
    """Which option was meant: dashes and underscores left out, "maxlen" is "max_len"."""
    if error.ctx is None:
        return ""
    flags = [flag for parameter in error.ctx.command.params for flag in (*parameter.opts, *parameter.secondary_opts)]
    known = {flag.lstrip("-").replace("_", ""): flag for flag in flags if flag.startswith("--")}
    given = error.option_name.lstrip("-").replace("_", "").replace("-", "")
    meant = did_you_mean(given, known)
    for bare, flag in known.items():
        meant = meant.replace(f'"{bare}"', f'"{flag}"')
    return f".{meant}" if meant else "; --help lists all options"


class _Option(click.Option):
    """An option that knows its group, and whether `--no_x` says anything."""

    def __init__(self, *args: Any, group: str | None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.group = group

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        if self.secondary_opts and self.default is not True:
            shown = copy.copy(self)
            shown.secondary_opts = []
            return click.Option.get_help_record(shown, ctx)
        return super().get_help_record(ctx)


class Command(_OneLineErrors):
    """A click command whose parameters came from a config class."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options under the headings of their groups; those without, such as `--help`, under the last one."""
        groups: dict[str, list[tuple[str, str]]] = {}
        heading = "Options"
        for parameter in self.get_params(ctx):
            heading = getattr(parameter, "group", None) or heading
            if (record := parameter.get_help_record(ctx)) is not None:
                groups.setdefault(heading, []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class Group(_OneLineErrors, click.Group):
    """A group that imports a command's module only when that command is called.

    Args:
        lazy: command name → "module:attribute" of its click command and the line that describes it in the list.
    """

    def __init__(self, *args: Any, lazy: dict[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Without arguments its help, which click prints as if that were a mistake in a group inside a group."""
        return super().parse_args(ctx, args or ([] if ctx.resilient_parsing else ["--help"]))

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return None
        import importlib

        module, _, attribute = self.lazy[cmd_name][0].partition(":")
        loaded: click.Command = getattr(importlib.import_module(module), attribute)
        return loaded

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self.lazy.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.lazy:
            known = ", ".join(self.lazy)
            raise UserError(f'no command "{args[0]}"; commands: {known}.{did_you_mean(args[0], self.lazy)}')
        return super().resolve_command(ctx, args)


def command(
    config_type: type[Config], *, name: str, refusal: Callable[[str], None] = report
) -> Callable[[Callable[[Config], Any]], Command]:
    """Decorator: a function of one config becomes a command; its docstring is the help text.

    A field named `config` gives the other values from that TOML file too. `refusal` prints the line of a mistake.
    """

    def decorate(function: Callable[[Config], Any]) -> Command:
        def callback(**values: Any) -> Any:
            config = config_type(**values)
            check_ranges(config)
            return function(config)

        made = Command(name=name, params=_parameters(config_type), callback=callback, help=function.__doc__)
        made.refusal = refusal
        return made

    return decorate


def _parameters(config_type: type[Any]) -> list[click.Parameter]:
    hints = typing.get_type_hints(config_type)
    parameters: list[click.Parameter] = [
        _click_parameter(field, hints[field.name], config_type) for field in dataclasses.fields(config_type)
    ]
    version = _Option(
        ["--version"],
        group=None,
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_print_version,
        help="print the version",
    )
    return [*parameters, version]


OF_THE_CALL = ("config", "dry_run", "json")
"""Options that say how a command is called, and nothing of what it does."""


def differences(config: Any) -> dict[str, Any]:
    """The values of a config that are not defaults, by option, in the order of `--help`."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in OF_THE_CALL and not field.metadata["option"].hidden:
            found[field.name] = value
    return found


def as_arguments(config: Any) -> list[str]:
    """The command line that gives the same config: what is not a default, whatever file it came from."""
    words: list[str] = []
    for name, value in differences(config).items():
        if isinstance(value, bool):
            words.append(f"--{name if value else f'no_{name}'}")
        else:
            words += [f"--{name}={item}" for item in (value if isinstance(value, tuple) else (value,))]
    return words


def describe_differences(config: Any) -> list[str]:
    """The same for people: a line each, with the default where there is one."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    found = differences(config)
    width = max(map(len, found), default=0)
    lines = []
    for name, value in found.items():
        said = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        default = defaults[name]
        if isinstance(value, bool):
            lines.append(f"  --{name if value else f'no_{name}'}")
            continue
        known = "" if default in (dataclasses.MISSING, None, "", ()) else f"  (default: {default})"
        lines.append(printable(f"  --{name:<{width}}  {said}{known}".replace("\n", "\\n")))
    return ["options that differ from the defaults:", *lines] if lines else ["all options have their defaults"]


def _print_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"jllm {__version__}")
        context.exit()


def value_type(hint: Any) -> tuple[type, bool, bool]:
    """The scalar type of a field's hint, whether it may repeat, and whether it may be None."""
    optional = False
    if isinstance(hint, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        assert len(members) == 1, f"an option has one type, not {hint}"
        hint, optional = members[0], True
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True, optional
    return hint, False, optional


def check_ranges(config: Any) -> None:
    """Raises:
    UserError: a number of a config is outside the range that stands with its option.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if value_type(hints[field.name])[0] not in (int, float):
            continue
        facts: OptionFacts = field.metadata["option"]
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and (mistake := facts.range.mistake(field.name, number)) is not None:
                raise UserError(mistake)


class _Choice(click.Choice[str]):
    """One of some values, each shown as it is written: click puts "_" for "-" into all of them, "-1" too."""

    def normalize_choice(self, choice: Any, ctx: click.Context | None) -> str:
        return choice if choice in self.choices else super().normalize_choice(choice, ctx)


class _Int64(click.types.IntParamType):
    """Integers that all that computes with them can hold."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not LEAST_INT <= number <= MOST_INT:
            self.fail(f"{number} is beyond 64 bits; give at most {MOST_INT}", param, ctx)
        return number


def _click_parameter(field: "dataclasses.Field[Any]", hint: Any, config_type: type[Any]) -> click.Parameter:
    facts: OptionFacts = field.metadata["option"]
    scalar, repeated, _ = value_type(hint)
    required = field.default is dataclasses.MISSING
    if facts.positional:
        kind = _Choice(facts.choices) if facts.choices else click.Path(path_type=Path)
        return click.Argument([field.name], type=kind, nargs=-1 if repeated else 1, required=required)
    settings: dict[str, Any] = {
        "help": facts.help,
        "metavar": facts.metavar,
        "hidden": facts.hidden,
        "group": facts.group,
        "required": required,
        "multiple": repeated,
        "show_default": not required and field.default not in (None, False, "", ()),
    }
    if not required:  # click takes any given default, None too, for a value
        settings["default"] = field.default
    long_name = f"--{field.name}"
    if scalar is bool:
        settings.pop("metavar")
        # `--no_x` exists where the flag can be on without being given: by default, or through a config file.
        return _Option([f"{long_name}/--no_{field.name}", *facts.flags, field.name], **settings)
    kinds: dict[type, click.ParamType[Any]] = {Path: click.Path(path_type=Path), int: _Int64()}
    settings["type"] = _Choice(facts.choices) if facts.choices else kinds.get(scalar, scalar)
    if field.name == "config":
        settings.update(is_eager=True, callback=_toml_reader(config_type))
    return _Option([*facts.flags, long_name, field.name], **settings)


def _toml_reader(config_type: type[Any]) -> Callable[[click.Context, click.Parameter, Path | None], Path | None]:
    def read(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
        if path is not None:
            context.default_map = {**(context.default_map or {}), **read_toml(path, config_type)}
        return path

    return read


def read_toml(path: Path, config_type: type[Any]) -> dict[str, Any]:
    """The values of a TOML file whose keys are `config_type`'s field names; tables only group them.

    Raises:
        UserError: the file cannot be read, a key is unknown or given twice, or a value has the wrong type.
    """
    try:
        document = notation.loads_toml(notation.read_text(path))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give a TOML file") from None
    except ValueError as error:
        raise UserError(f"--config {path}: not valid TOML: {error}") from None
    hints = typing.get_type_hints(config_type)
    known = [field.name for field in dataclasses.fields(config_type) if not field.metadata["option"].hidden]
    known.remove("config")
    values: dict[str, Any] = {}
    for key, value in _flat(document):
        if key not in known:
            raise UserError(f'--config {path}: unknown key "{key}".{did_you_mean(key, known)} --help lists them all')
        if key in values:
            raise UserError(f'--config {path}: key "{key}" is given twice; keep one')
        values[key] = _checked(path, key, value, hints[key])
    return values


def _flat(document: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    for key, value in document.items():
        if isinstance(value, dict):
            yield from value.items()
        else:
            yield key, value


def _checked(path: Path, key: str, value: Any, hint: Any) -> Any:
    scalar, repeated, _ = value_type(hint)
    allowed: tuple[type, ...] = {float: (int, float), int: (int,), bool: (bool,)}.get(scalar, (str,))
    items = value if repeated and isinstance(value, list) else [value]
    for item in items:
        if not isinstance(item, allowed) or (scalar is not bool and isinstance(item, bool)):
            wanted = "text in quotes" if allowed == (str,) else "true or false" if scalar is bool else scalar.__name__
            raise UserError(f"--config {path}: {key} = {item!r} is not {wanted}")
        if isinstance(item, int) and not LEAST_INT <= item <= MOST_INT:
            raise UserError(f"--config {path}: {key} = {item} is beyond 64 bits; give at most {MOST_INT}")
    return items if repeated else value
