"""All data sets of a folder through `shuffle_set`, with a line of report for each, and what became of a mixture."""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jllm.data.dataset.manifest import DataSet, data_sets_below, one_tokenizer, open_data_set, write_manifest
from jllm.data.shuffle.config import ShuffleConfig
from jllm.data.shuffle.data_set import Outcome, Resources, clean, refuse_place, shuffle_set
from jllm.data.shuffle.mix import ALL_ONCE, Mix, Recipe, make_recipes, read_mix
from jllm.errors import say
from jllm.machine import free_memory, parse_memory, usable_cores, use_thrifty_allocator


def shuffle_folder(config: ShuffleConfig, *, one_set: bool) -> list[Outcome]:
    """Shuffle the data sets of `config.data`, or all of it as one set."""
    use_thrifty_allocator()
    resources = Resources(
        cores=usable_cores(config.cores),
        memory=parse_memory("--memory", config.memory) if config.memory else int(config.mem_rate * free_memory()),
    )
    mix = read_mix(config.mix, by=config.mix_by, total=config.mix_total, max_tokens=config.max_tokens)
    sets = [open_data_set(config.data)] if one_set else data_sets_below(config.data)
    one_tokenizer(sets)  # rows of different vocabularies must not end up in one folder
    source = config.data.resolve()
    output = (config.output or source.with_name(f"{source.name}-sf")).resolve()
    refuse_place(output, output, source)
    recipes = make_recipes(mix, sets)
    outcomes = []
    for data_set in sets:
        if data_set.name in recipes:
            folder = output / f"{data_set.name}-00000"
            outcomes.append(_shuffle_one(data_set, folder, config, resources, recipes[data_set.name]))
        else:
            say(f"{data_set.name}: left out")
    if mix != Mix():
        outcomes = _report_mix(mix, outcomes)
    shown = config.output or (output if config.data.is_absolute() else Path(os.path.relpath(output)))
    say(f"{shown}: ready; next: python -m jllm.repartition -d {shown} -n PARTITIONS")
    return outcomes


def _shuffle_one(
    data_set: DataSet, folder: Path, config: ShuffleConfig, resources: Resources, recipe: Recipe
) -> Outcome:
    if config.clean:
        clean(folder)
    blocks = blocks_of(data_set, config.num_block, recipe)
    begin = time.monotonic()
    outcome = shuffle_set(data_set, folder, blocks=blocks, seed=config.seed, resources=resources, recipe=recipe)
    seconds = time.monotonic() - begin
    tokens = outcome.manifest.total("tokens") or 0
    facts = f"{data_set.name}: {outcome.manifest.rows:,} rows, {tokens:,} tokens in {blocks} files"
    if recipe != ALL_ONCE:
        facts += f" (of {data_set.manifest.rows:,} rows)"
    if outcome.blocks_kept == blocks:
        say(f"{facts}: already shuffled")
    else:
        kept = f", {outcome.blocks_kept} files kept from an earlier run" if outcome.blocks_kept else ""
        say(f"{facts}, {seconds:.1f} s ({tokens / 1e6 / max(seconds, 1e-9):.1f} M tokens/s){kept}")
    return outcome


def blocks_of(data_set: DataSet, num_block: int | None, recipe: Recipe = ALL_ONCE) -> int:
    """How many files a data set is dealt to; says so where they are fewer than was asked for."""
    blocks = num_block or max(1, len(data_set.manifest.files))
    if num_block is not None and blocks > (most := most_blocks(data_set, recipe)):
        say(f"warning: {data_set.name}: {most:,} rows are dealt to {most:,} files, not {blocks:,}")
        blocks = most
    return blocks


def most_blocks(data_set: DataSet, recipe: Recipe) -> int:
    """As many files as have a row each, of what is taken of a set at least, as far as that is known beforehand."""
    rows = float(data_set.manifest.rows)
    if recipe.rows is not None:
        rows = recipe.rows
    elif recipe.rate is not None and not recipe.sources:
        rows *= recipe.subsample * recipe.rate
    if recipe.max_rows is not None:
        rows = min(rows, recipe.max_rows)
    return max(1, int(rows))


def _report_mix(mix: Mix, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Print each set's share of the mixture and record it in its manifest."""
    rows = sum(outcome.manifest.rows for outcome in outcomes)
    tokens = sum(outcome.manifest.total("tokens") or 0 for outcome in outcomes)
    say(f"{'mixture':<32}{'rows':>14}{'share':>8}{'tokens':>18}{'share':>8}")
    finished = []
    for outcome in outcomes:
        manifest = outcome.manifest
        own_tokens = manifest.total("tokens") or 0
        facts: dict[str, Any] = {
            "rows": manifest.rows,
            "tokens": own_tokens,
            "share_of_rows": round(manifest.rows / max(1, rows), 6),
            "share_of_tokens": round(own_tokens / max(1, tokens), 6),
        }
        by_rows, by_tokens = f"{100 * facts['share_of_rows']:.1f} %", f"{100 * facts['share_of_tokens']:.1f} %"
        say(f"{outcome.folder.name:<32}{manifest.rows:>14,}{by_rows:>8}{own_tokens:>18,}{by_tokens:>8}")
        mixed = dataclasses.replace(manifest, extra={**manifest.extra, "mix": facts})
        if mixed != manifest:
            write_manifest(outcome.folder, mixed)
        finished.append(dataclasses.replace(outcome, manifest=mixed))
    found = [outcome.source_tags for outcome in outcomes]
    if None not in found:
        unknown = set(mix.sources) - {tag for tags in found if tags is not None for tag in tags}
        for tag in sorted(unknown):
            say(f'warning: no row has the source "{tag}"; its weight has no effect')
    return finished
