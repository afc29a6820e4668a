"""The data sets that a run of `raw2ids` makes: where they lie, and under which options they are recorded."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jllm.data.dataset.manifest import MANIFEST_NAME
from jllm.data.prepare import holdout
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.prepare.workplace import WORK_NAME, Workplace
from jllm.data.sources.inputs import STDIN, Source
from jllm.data.tokenizer.facts import base_name
from jllm.errors import UserError

NOT_IN_THE_MANIFEST = (
    "input", "output", "eval_output", "tokenizer", "cores", "threads", "clean", "on_error", "engine", "debug", "quiet",
    "bad_records", "dry_run",
)  # fmt: skip
"""Options that do not decide what is made, or that the manifest records in another place."""


RULES = 2
"""The version of the rules by which the same input, options and tokenizer become the same rows. It is raised with every
change of them, so that a run is never finished by other rules than it was begun by."""
NAMES_OF_OUR_FOLDERS = (MANIFEST_NAME, WORK_NAME, ".plan.json")
"""What a folder that a command of ours made, or has begun to make, has in it."""


def refuse_overlap(inputs: Sequence[str], sources: Sequence[Source], outputs: Sequence["OutputSet"]) -> None:
    """Refuse data sets that would lie where the input is, before anything there is touched.

    Raises:
        UserError: an output lies in an input folder, or a Parquet file of the input lies in an output.
    """
    for output in outputs:
        folder = output.place.folder
        whole = folder.resolve()
        for given in inputs:
            place = Path(given).expanduser()
            if given != STDIN and "://" not in given and place.is_dir() and whole.is_relative_to(place.resolve()):
                raise UserError(f"-o {folder}: lies in the input folder {given}; give a folder beside it")
        for source in sources:
            if (
                source.is_local
                and source.kind in ("parquet", "ids")
                and Path(source.path).resolve().is_relative_to(whole)
            ):
                raise UserError(f"-o {folder}: the input {source.path} lies in it; give another folder")


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
    values = dataclasses.asdict(config)
    absent = NOT_IN_THE_MANIFEST if config.eval_fraction is not None else (*NOT_IN_THE_MANIFEST, "seed")
    return {key: value for key, value in values.items() if key not in absent}


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
