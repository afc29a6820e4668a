"""The data sets that a run of `raw2ids` makes: where they lie, and under which options they are recorded."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from jllm.data.chat.records.conversation import LEFT_OUT, UNUSED
from jllm.data.dataset.manifest import MANIFEST_NAME
from jllm.data.prepare import holdout, recipes
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.prepare.reporting.totals import named
from jllm.data.prepare.workplace import WORK_NAME, Workplace
from jllm.data.sources.inputs import STDIN, Source, without_password
from jllm.data.tokenizer.facts import TokenizerFacts, base_name
from jllm.errors import UserError

NOT_IN_THE_MANIFEST = (
    "input", "output", "eval_output", "tokenizer", "cores", "threads", "clean", "on_error", "engine", "debug", "quiet",
    "bad_records", "max_record", "dry_run", "json",
)  # fmt: skip
"""Options that do not decide what is made, or that the manifest records in another place."""


RULES = 4
"""The version of the rules by which the same input, options and tokenizer become the same rows. It is raised with every
change of them, so that a run is never finished by other rules than it was begun by."""
NAMES_OF_OUR_FOLDERS = (MANIFEST_NAME, WORK_NAME, ".plan.json")
"""What a folder that a command of ours made, or has begun to make, has in it."""


def refuse_overlap(inputs: Sequence[str], sources: Sequence[Source], outputs: Sequence["OutputSet"]) -> None:
    """Refuse data sets that would lie where the input is, before anything there is touched.

    Raises:
        UserError: an output lies in an input folder, or a Parquet file of the input lies in an output.
    """
    folders = [
        (given, Path(given).expanduser().resolve())
        for given in inputs
        if given != STDIN and "://" not in given and Path(given).expanduser().is_dir()
    ]
    files = [(each.path, Path(each.path).resolve()) for each in sources if each.is_local and is_parquet(each)]
    for output in outputs:
        refuse_place(output.place.folder, output.place.folder.resolve(), folders, files)


def is_parquet(source: Source) -> bool:
    """Whether a source is a file such as outputs have."""
    return source.kind in ("parquet", "ids")


def refuse_place(
    shown: object, output: PurePath, folders: Sequence[tuple[str, PurePath]], files: Sequence[tuple[str, PurePath]]
) -> None:
    """Refuse an output folder.

    Args:
        shown, output: as it was given, and where that is.
        folders, files: of the input, each as it was given and where that is; files such as outputs have.

    Raises:
        UserError: it lies in one of the folders, or one of the files in it.
    """
    for given, place in folders:
        if output.is_relative_to(place):
            raise UserError(f"-o {shown}: lies in the input folder {given}; give a folder beside it")
    for given, place in files:
        if place.is_relative_to(output):
            raise UserError(f"-o {shown}: the input {given} lies in it; give another folder")


def shown_input(inputs: Sequence[str], files: int) -> str:
    """The option and what it was given, for people."""
    given = " ".join(without_password(name) for name in inputs)
    return f"-i {given}" + (f" ({files} files)" if files > 1 else "")


def changed_meanwhile(source: Source) -> UserError:
    return UserError(
        f"-i {source.path}: was changed while it was read; leave it as it is during a run, and run the same command"
        " again"
    )


def chat_record(
    config: Raw2IdsConfig,
    facts: TokenizerFacts,
    hashes: Sequence[str | None],
    formats: Sequence[str],
    date: str,
    counts: Mapping[str, int],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """What the manifest says of conversations: how they were rendered, and what of them was left out.

    Args:
        hashes: of the templates, as `recipes.template_hashes` gives them.
    """
    return {
        "template": recipes.template_of(config, facts)[1],
        "template_sha256": hashes[0],
        **({"tools_template_sha256": hashes[1]} if hashes[1] is not None else {}),
        "formats": list(dict.fromkeys(formats)),
        "date": date or None,
        "overlong": counts.get("overlong", 0),
        "left_out": named(counts, LEFT_OUT),
        "unused_fields": named(counts, UNUSED),
        "warnings": list(warnings),
    }


def beside(config: Raw2IdsConfig, sources: list[Source]) -> Path:
    """The default output: beside the input, `<stem>_<tokenizer's base name>`."""
    first = config.input[0]
    if first == STDIN or "://" in first:
        raise UserError(f"-i {first}: say where the data set goes with -o")
    given = Path(first)
    if given.is_dir():
        parent, stem = given.resolve().parent, given.resolve().name
    else:
        parent, stem = Path(sources[0].path).parent, sources[0].stem
    return parent / f"{stem}_{base_name(config.tokenizer)}"


def recorded_options(config: Raw2IdsConfig) -> dict[str, Any]:
    """The options that decide what is made, as plain data."""
    values = dataclasses.asdict(config) | {"overlong": config.overlong_way}
    absent = NOT_IN_THE_MANIFEST if config.eval_fraction is not None else (*NOT_IN_THE_MANIFEST, "seed")
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return {key: value for key, value in plain.items() if key not in absent}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputSet:
    """One of the data sets that a run makes.

    Attributes:
        name: of its sink.
        place: where it is made.
        options: recorded beside those of the command.
        share: of the documents; its splits and files are cut after that share of `--num` and `--batch_size`, so that
            all data sets of a run finish files at the same pace, and little must be kept to resume from.
    """

    name: str
    place: Workplace
    options: dict[str, Any]
    share: float = 1.0


def outputs_of(config: Raw2IdsConfig, output: Path) -> list[OutputSet]:
    """The data set that was asked for, and the one of held-out documents where there is one."""
    main = OutputSet(name="main", place=Workplace(output), options={})
    if config.eval_fraction is None:
        return [main]
    held = config.eval_output or holdout.default_folder(output)
    whole, other = output.resolve(), held.resolve()
    if whole.is_relative_to(other) or other.is_relative_to(whole):
        raise UserError(f"--eval_output {held}: lies in the output folder or around it; give a folder of its own")
    return [main, OutputSet(name="eval", place=Workplace(held), options={"part": "eval"}, share=config.eval_fraction)]


def clean_held_out(main: OutputSet) -> None:
    """Remove what an earlier run held out from `main`, so that it is not taken for the other data set of a run that
    holds out nothing."""
    place = Workplace(holdout.default_folder(main.place.folder))
    if place.folder.is_dir() and main.place.earlier_options().get("eval_fraction"):
        with place.locked():
            place.clean()
            place.close()
        with contextlib.suppress(OSError):
            place.folder.rmdir()
            place.folder.parent.rmdir()
