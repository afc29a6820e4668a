"""The options of `shuffle_datasets` and `shuffle_partition`, once: flags, checks and help."""

import dataclasses
from pathlib import Path

from jllm.errors import UserError
from jllm.machine import megabytes, parse_memory
from jllm.options import option
from jllm.ranges import LEAST_INT

MOST_BLOCKS = 1_000_000
LEAST_MEMORY = 16 << 20
"""A row group and what is made of it; with less, a shuffle would take more than it was given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShuffleConfig:
    """Options of `shuffle_datasets` and `shuffle_partition`."""

    data: Path = option(dataclasses.MISSING, "-d", help="folder of data set folders, or one data set", metavar="FOLDER")
    output: Path | None = option(None, "-o", help="output folder  [default: <data>-sf]", metavar="FOLDER")
    num_block: int | None = option(
        None, "-n", help="files to deal each data set to  [default: as many as it has]", metavar="N"
    )
    seed: int = option(1234, help="seed of the permutation; with the data it decides the order alone")
    cores: int = option(-1, least=LEAST_INT, help="workers; negative: all cores")
    mem_rate: float = option(0.8, help="share of the free memory to use")
    memory: str | None = option(None, help="absolute memory cap, such as 512M or 4G, instead of --mem_rate")
    mix: tuple[str, ...] = option(
        (),
        help="weight of a data set as SET=WEIGHT (2.5: every row twice, half of them a third time), of a source tag as"
        " source:TAG=WEIGHT, or a TOML file with all of them; may be repeated",
        metavar="SET=WEIGHT|FILE",
    )
    mix_by: str | None = option(
        None,
        help="what weights are: repetition rates, or shares in rows or tokens  [default: rate]",
        choices=("rate", "rows", "tokens"),
    )
    mix_total: str | None = option(
        None, help="rows or tokens of the whole mixture, such as 10B, for shares  [default: as much as repeats no row]"
    )
    max_tokens: tuple[str, ...] = option(
        (), help="tokens to take of each data set at most, such as 1B, or of one: SET=1B; may be repeated"
    )
    clean: bool = option(False, "-C", help="start over: remove what an earlier run left in the output folder")

    def __post_init__(self) -> None:
        check_order(self.num_block, self.seed)
        if self.memory is not None and (given := parse_memory("--memory", self.memory)) < LEAST_MEMORY:
            raise UserError(f"--memory {self.memory}: that is {given:,} bytes; give at least {megabytes(LEAST_MEMORY)}")
        if not 0 < self.mem_rate <= 1:
            raise UserError(f"--mem_rate {self.mem_rate}: give a share above 0 and at most 1")


def check_order(num_block: int | None, seed: int) -> None:
    """Raises:
    UserError: these are no files to deal to, or no seed.
    """
    if num_block is not None and num_block < 1:
        raise UserError(f"--num_block {num_block}: give at least 1")
    if num_block is not None and num_block > MOST_BLOCKS:
        raise UserError(f"--num_block {num_block}: give at most {MOST_BLOCKS:,}: each is a file")
    if seed < 0:
        raise UserError(f"--seed {seed}: give 0 or more")
