"""All data sets of a folder through `shuffle_set`, with a line of report for each."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from jllm.data.machine import free_memory, parse_memory, usable_cores, use_thrifty_allocator
from jllm.data.manifest import DataSet, data_sets_below, one_tokenizer, open_data_set
from jllm.data.shuffle import Outcome, Resources, clean, shuffle_set
from jllm.errors import UserError

if TYPE_CHECKING:
    from jllm.shuffle_datasets import ShuffleConfig


def shuffle_folder(config: "ShuffleConfig", *, one_set: bool) -> list[Outcome]:
    """Shuffle the data sets of `config.data`, or all of it as one set."""
    use_thrifty_allocator()
    resources = Resources(
        cores=usable_cores(config.cores),
        memory=parse_memory("--memory", config.memory) if config.memory else int(config.mem_rate * free_memory()),
    )
    sets = [open_data_set(config.data)] if one_set else data_sets_below(config.data)
    one_tokenizer(sets)  # rows of different vocabularies must not end up in one folder
    source = config.data.resolve()
    output = (config.output or source.with_name(f"{source.name}-sf")).resolve()
    if output == source or source in output.parents:
        raise UserError(f"--output {output}: lies in the input folder; give a folder beside it")
    outcomes = []
    for data_set in sets:
        outcomes.append(_shuffle_one(data_set, output / f"{data_set.name}-00000", config, resources))
    print(f"{output}: ready; next: python -m jllm.repartition -d {output} -n PARTITIONS", flush=True)
    return outcomes


def _shuffle_one(data_set: DataSet, folder: Path, config: "ShuffleConfig", resources: Resources) -> Outcome:
    if config.clean:
        clean(folder)
    blocks = config.num_block or len(data_set.manifest.files)
    begin = time.monotonic()
    outcome = shuffle_set(data_set, folder, blocks=blocks, seed=config.seed, resources=resources)
    seconds = time.monotonic() - begin
    tokens = outcome.manifest.total("tokens") or 0
    facts = f"{data_set.name}: {outcome.manifest.rows:,} rows, {tokens:,} tokens in {blocks} files"
    if outcome.blocks_kept == blocks:
        print(f"{facts}: already shuffled", flush=True)
    else:
        kept = f", {outcome.blocks_kept} files kept from an earlier run" if outcome.blocks_kept else ""
        print(f"{facts}, {seconds:.1f} s ({tokens / 1e6 / max(seconds, 1e-9):.1f} M tokens/s){kept}", flush=True)
    return outcome
