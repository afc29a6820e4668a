"""`python -m jllm.repartition`: deal the files of all data sets of a folder to partitions."""

import dataclasses
from pathlib import Path

from jllm.errors import UserError, say
from jllm.options import command, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepartitionConfig:
    """Options of `repartition`."""

    data: Path = option(dataclasses.MISSING, "-d", help="folder of shuffled data sets", metavar="FOLDER")
    num_partition: int | None = option(None, "-n", help="number of partitions", metavar="N")
    partition_tokens: str | None = option(None, help="tokens in a partition, such as 500M or 1B, instead of -n")
    dry_run: bool = option(False, help="print the plan and change nothing")

    def __post_init__(self) -> None:
        if (self.num_partition is None) == (self.partition_tokens is None):
            raise UserError("give either --num_partition (-n) or --partition_tokens")
        if self.num_partition is not None and self.num_partition < 1:
            raise UserError(f"--num_partition {self.num_partition}: give at least 1")


@command(RepartitionConfig, name="repartition")
def main(config: RepartitionConfig) -> None:
    """Deal the files of all data sets of a folder to partitions: number k gets block k, k+n, ... of every set.

    Files are renamed, not copied. A killed run loses nothing and is finished by running it again.
    """
    from jllm.data.shuffle.repartition import make_plan, recover, repartition
    from jllm.machine import parse_count

    folder = config.data.resolve()
    recover(folder)
    tokens = parse_count("--partition_tokens", config.partition_tokens) if config.partition_tokens is not None else None
    plan = make_plan(folder, config.num_partition, tokens)
    say(plan.info(folder.name).rstrip("\n"))
    for note in plan.notes:
        say(f"warning: {note}")
    if config.dry_run:
        say("dry run: nothing was changed")
    elif repartition(folder, plan):
        say(f"{config.data}: ready; next: deepspeed --module jllm.train_pipe --train_data {config.data} ...")
    else:
        say(f"{config.data}: already so; nothing to do")
