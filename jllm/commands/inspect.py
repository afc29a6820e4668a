"""`jllm inspect FOLDER`: look at a data set: what it is, how long its rows are, what some of them say."""

import dataclasses
from pathlib import Path

from jllm.errors import UserError, say
from jllm.options import command, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Options of `inspect`."""

    folder: Path = option(dataclasses.MISSING, help="folder of a data set", positional=True)
    tokenizer: str | None = option(None, help="Hugging Face folder or name; without it ids are shown, not text")
    rows: int = option(2, "-n", help="rows to show", metavar="N")
    start: int = option(0, help="number of the first row to show", metavar="N")
    verify: bool = option(False, help="read every file and compare its checksum")
    color: str = option("auto", help="green: trained on; dim: padding", choices=("auto", "always", "never"))

    def __post_init__(self) -> None:
        for name in ("rows", "start"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: give 0 or more")


@command(InspectConfig, name="inspect")
def main(config: InspectConfig) -> None:
    """Show a data set: summary, row lengths, decoded rows with the trained part coloured; --verify checks every
    byte."""
    from jllm.data.dataset.describe import verify_folder
    from jllm.data.dataset.manifest import open_data_set
    from jllm.data.show import show_rows, show_summary
    from jllm.data.tokenizer.decoding import make_decoder
    from jllm.machine import usable_cores

    data = verify_folder(config.folder, cores=usable_cores()) if config.verify else open_data_set(config.folder)
    rows = data.manifest.rows
    if config.rows and config.start > rows:
        raise UserError(f"--start {config.start}: {config.folder} has {rows:,} rows; give at most {max(0, rows - 1)}")
    show_summary(data)
    if config.rows and config.start == rows:
        say(f"no row {rows:,}: {f'the last one is {rows - 1:,}' if rows else 'the data set is empty'}")
    elif config.rows:
        decode = make_decoder(config.tokenizer, data.manifest.tokenizer) if config.tokenizer else None
        show_rows(data, decode, rows=config.rows, start=config.start, color=config.color)
    if config.verify:
        say(f"verified: {len(data.paths)} of {len(data.paths)} files have a checksum, and all of them match")
