"""Data sets as the processes of a run have them: opened and checked by the readers, known to all.

Every reader opens its data, then all processes hear what every reader found, so that all stop with the same line or
none. Nodes that have the same data must have the same, by fingerprint; with `--dist_data` each node has a part of its
own, and the parts together are the data set.
"""

import dataclasses
import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jllm import children
from jllm.data.dataset.columns import CONTROL_CLASS as CLASSES
from jllm.data.dataset.columns import REF_LABELS, REF_LOGPS
from jllm.data.dataset.manifest import one_reference, one_template, open_data_set
from jllm.data.dataset.shards import Int32
from jllm.errors import EXIT_CODE, UserError, say
from jllm.models.pipeline.bundle import CONTROL_CLASS, DOCUMENTS, READ
from jllm.models.weights.source import ModelInfo
from jllm.train.checks.data_sets import check_batch, check_data_sets, warnings_about_columns, warnings_about_rows
from jllm.train.checks.tokenizers import check_tokenizer
from jllm.train.config import TrainConfig, WeightedFolder, weighted_folders
from jllm.train.data.batching import NEWEST_RULE, EpochSteps, Parts, TokenBudget
from jllm.train.data.loader import BatchShare, Cursor, ReadAhead, Step, train_steps
from jllm.train.data.rows import ShardIndex, row_lengths
from jllm.train.distributed.agreement import Agreement
from jllm.train.shape import RunShape

TEXT_SUFFIXES = (".jsonl", ".json", ".txt")
DEFAULT_ROW = 2049
POOR_FILLING, GOOD_FILLING = 0.7, 0.8
"""Below the one, a token budget is warned about; from the other on, a larger one is worth naming."""
SAMPLED_ROWS = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What every process needs to know of a data set.

    Attributes:
        fingerprint: the data set's.
        num_rows: rows of an epoch.
        tokens: of an epoch; None where a manifest does not say.
        longest_row: in tokens; None where a manifest does not say.
        chat_template: of its conversations; None where there are none, or several differ.
        warnings: what is odd about it without being wrong, one line each.
        templates_differ: several sets have different ones.
        reference: what made the reference log-probabilities of its pairs, where they are there and looked at.
    """

    fingerprint: str
    num_rows: int
    tokens: int | None
    longest_row: int | None
    chat_template: str | None = None
    warnings: tuple[str, ...] = ()
    templates_differ: bool = False
    reference: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """A data set as this process has it.

    Attributes:
        facts: of all parts.
        index: of this node's part; None on processes that do not read.
        share: what this process's pipeline takes of that part.
        parts: how the rows lie on the nodes.
    """

    facts: DataFacts
    index: ShardIndex | None
    share: BatchShare
    parts: Parts


def warnings_of(*data: Data) -> list[str]:
    """What is odd about data sets, each line once."""
    return list(dict.fromkeys(line for each in data for line in each.facts.warnings))


def planes_of(config: TrainConfig) -> tuple[str, ...]:
    """What the first stage is given of every micro-batch beside its input ids."""
    if config.has_pairs:
        return (*READ, DOCUMENTS)
    return (*READ, CONTROL_CLASS) if config.has_control else READ


def share_of(
    config: TrainConfig,
    shape: RunShape,
    model: ModelInfo,
    *,
    data_rank: int,
    data_size: int,
    rule: int = NEWEST_RULE,
    references: bool = False,
) -> BatchShare:
    """What one of `data_size` pipelines takes of a global batch; `rule` is that of `jllm.train.data.batching`, and
    `references` says whether rows have reference log-probabilities."""
    budget = None
    if config.batch_size_tokens is not None:
        budget = TokenBudget(
            tokens=config.batch_size_tokens,
            micro_batches=shape.accumulation * data_size,
            seq_len=model.longest_input(config.seq_len),
            rule=rule,
            joins=config.block_mask and rule > 1,
        )
    return BatchShare(
        micro_batch=shape.micro_batch,
        accumulation=shape.accumulation,
        data_rank=data_rank,
        data_size=data_size,
        seq_len=config.seq_len,
        positions=model.learned_positions,
        block_mask=config.block_mask,
        vocab_size=model.vocab_size,
        budget=budget,
        planes=planes_of(config),
        references=references,
    )


def open_training_data(
    config: TrainConfig, shape: RunShape, agreement: Agreement, model: ModelInfo, *, rule: int = NEWEST_RULE
) -> Data:
    """Open `--train_data` on the readers, and tell every process about it.

    Args:
        config, shape, agreement, model: of the run.
        rule: how rows are grouped by tokens (`jllm.train.data.batching`).

    Raises:
        UserError: on every process: not a data set, one that `jllm.train.checks.data_sets` refuses, or another
            tokenizer; nodes that have different data; or steps that are larger than an epoch.
    """
    given = agreement.from_first_reader(lambda: [_as_shards(each, config) for each in weighted_folders(config)])
    data = _open(given, config, shape, agreement, model, distributed=config.dist_data, rule=rule)
    check_batch(config, rows=data.facts.num_rows, step_rows=sum(data.parts.batch), longest_row=data.facts.longest_row)
    return _with_first_step_largest(data, config, model)


def open_evaluation_data(
    folder: Path, config: TrainConfig, shape: RunShape, agreement: Agreement, model: ModelInfo
) -> Data:
    """Open one set of `--eval_data`, which is the same on all nodes, likewise."""
    given = agreement.from_first_reader(lambda: [_as_shards(WeightedFolder(folder=folder), config)])
    by_rows = dataclasses.replace(config, batch_size_tokens=None)
    return _open(given, by_rows, shape, agreement, model, distributed=False)


def open_sets(
    given: list[WeightedFolder], config: TrainConfig, model: ModelInfo | None = None
) -> tuple[ShardIndex, DataFacts]:
    """The data sets of these folders as one, and the facts about it; with `model`, checked whether it can take them.

    Raises:
        UserError: as in `open_training_data`.
    """
    names = ", ".join(str(each.folder) for each in given)
    sets = [open_data_set(each.folder) for each in given]
    warnings = [line for data_set in sets for line in check_tokenizer(data_set, config)]
    if model is not None:
        check_data_sets(given, sets, config, model)
        warnings += [*warnings_about_rows(sets, model), *warnings_about_columns(sets, config)]
    reference = one_reference(sets) if config.needs_reference else None
    further = [CLASSES.name] if config.has_control else []
    further += [REF_LOGPS.name, REF_LABELS.name] if reference is not None else []
    index = ShardIndex(*sets, weights=[each.weight for each in given], further=further)
    if index.num_rows == 0:
        raise UserError(f"{names}: the data set has no rows; make it again from input that is not empty")
    longest = [data_set.manifest.longest_row for data_set in sets]
    known = [length for length in longest if length is not None]
    tokens = [data_set.manifest.total("tokens") for data_set in sets]
    facts = DataFacts(
        fingerprint=index.fingerprint,
        num_rows=index.num_rows,
        tokens=sum(int(each.weight * (count or 0)) for each, count in zip(given, tokens, strict=True))
        if None not in tokens
        else None,
        longest_row=max(known) if len(known) == len(longest) else None,
        chat_template=one_template(sets),
        warnings=tuple(warnings),
        templates_differ=len({each.manifest.chat_template for each in sets} - {None}) > 1,
        reference=reference,
    )
    return index, facts


def _open(
    given: list[WeightedFolder],
    config: TrainConfig,
    shape: RunShape,
    agreement: Agreement,
    model: ModelInfo,
    *,
    distributed: bool,
    rule: int = NEWEST_RULE,
) -> Data:
    index, facts, mistake = None, None, None
    if agreement.place.is_reader:
        try:
            index, facts = open_sets(given, config, model)
        except UserError as error:
            mistake = str(error)
    found = agreement.gather((agreement.node, facts, mistake))
    for _, _, each in found:
        if each is not None:
            raise UserError(each)
    readers = [(rank, node, facts) for rank, (node, facts, _) in enumerate(found) if facts is not None]
    nodes: dict[int, list[int]] = {}
    views: dict[int, tuple[int, DataFacts]] = {}
    for rank, node, view in readers:
        place = node if distributed else 0
        nodes.setdefault(place, []).append(rank)
        first_rank, first = views.setdefault(place, (rank, view))
        if view.fingerprint != first.fingerprint:
            raise UserError(
                f"data out of sync: {given[0].folder} is another data set on the node of rank {rank}"
                f" ({view.fingerprint[:12]}) than on that of rank {first_rank} ({first.fingerprint[:12]}); copy it anew"
                " (or give --dist_data, if each node has a part of its own)"
            )
    references = readers[0][2].reference is not None
    mine = agreement.node if distributed else 0
    ranks = nodes.get(mine, [])
    share = share_of(
        config,
        shape,
        model,
        data_rank=ranks.index(agreement.rank) if agreement.place.is_reader else 0,
        data_size=max(len(ranks), 1),
        rule=rule,
        references=references,
    )
    parts = Parts(
        rows=tuple(view.num_rows for _, view in views.values()),
        batch=tuple(shape.micro_batch * shape.accumulation * len(nodes[place]) for place in views),
        mine=list(views).index(mine) if mine in views else 0,
    )
    return Data(facts=_together([view for _, view in views.values()]), index=index, share=share, parts=parts)


def _with_first_step_largest(data: Data, config: TrainConfig, model: ModelInfo) -> Data:
    """The data, its first step padded to the longest row of all parts.

    Not where that is unknown, nor where padding has a part in what is computed: in the balance loss of routers, and in
    rotary embeddings that depend on the length.
    """
    longest = data.facts.longest_row
    if longest is None or config.router_aux_loss_coef or model.positions_depend_on_length:
        return data
    return dataclasses.replace(data, share=dataclasses.replace(data.share, longest=longest - 1))


def _together(parts: list[DataFacts]) -> DataFacts:
    """The facts of the set that the parts make together."""
    if len(parts) == 1:
        return parts[0]
    tokens = [part.tokens for part in parts]
    lengths = [part.longest_row for part in parts]
    templates = {part.chat_template for part in parts} - {None}
    return DataFacts(
        fingerprint=hashlib.sha256(" ".join(part.fingerprint for part in parts).encode()).hexdigest(),
        num_rows=sum(part.num_rows for part in parts),
        tokens=sum(count for count in tokens if count is not None) if None not in tokens else None,
        longest_row=max(length for length in lengths if length is not None) if None not in lengths else None,
        reference=parts[0].reference,
        templates_differ=len(templates) > 1 or any(part.templates_differ for part in parts),
        chat_template=templates.pop() if len(templates) == 1 else None,
        warnings=tuple(dict.fromkeys(line for part in parts for line in part.warnings)),
    )


def epoch_steps(config: TrainConfig, index: ShardIndex | None, share: BatchShare, parts: Parts) -> EpochSteps:
    """The steps of every epoch of the run. With a token budget, reads the length of every row, in the run's order.

    `index` is needed for that only.
    """
    budget = share.budget
    if budget is None:
        return EpochSteps(counts=(parts.steps,))
    assert index is not None
    window = budget.window_rows(index.mean_length)
    counts: list[int] = []
    filling, larger = None, None
    while len(counts) < config.num_train_epochs if config.max_steps is None else sum(counts) < config.max_steps:
        order = index.order(seed=config.seed, epoch=len(counts), shuffle=not config.no_shuf)
        lengths = row_lengths(index, order)
        if filling is None:
            filling = budget.survey(lengths, window=window)
            counts.append(filling.steps)
            if filling.filled < POOR_FILLING:
                larger = _larger_budget(budget, index, lengths)
        else:
            counts.append(
                budget.survey(lengths, window=window).steps if budget.rule > 1 else budget.count_steps(lengths)
            )
    return EpochSteps(counts=tuple(counts), filling=filling, larger=larger)


def _larger_budget(budget: TokenBudget, index: ShardIndex, lengths: Int32) -> int | None:
    """The smallest of some larger budgets that fills micro-batches well; None where none of them does."""
    some = lengths[:SAMPLED_ROWS]
    for factor in (2, 4, 8, 16):
        larger = dataclasses.replace(budget, tokens=factor * budget.tokens, micro_batches=1)
        if larger.survey(some, window=larger.window_rows(index.mean_length)).filled >= GOOD_FILLING:
            return larger.tokens
    return None


def _as_shards(given: WeightedFolder, config: TrainConfig) -> WeightedFolder:
    """A text or JSON file is converted first, beside itself; a folder stays what it is.

    `raw2ids` finds what an earlier start has converted, and refuses to mix it with other options.
    """
    path = given.folder
    if not path.is_file():
        return given
    suffixes = [suffix for suffix in path.suffixes if suffix in TEXT_SUFFIXES]
    if not suffixes:
        raise UserError(f"{path}: give a folder of shards, or a file that ends in {', '.join(TEXT_SUFFIXES)}")
    assert config.model is not None
    row = DEFAULT_ROW if config.seq_len is None else config.seq_len + 1
    output = path.with_name(f"{path.name.split('.')[0]}_{config.model.resolve().name}_{row}")
    kind = ["--type", "pretrain", "--stack"] if _is_text(path) else ["--type", "ft", "--filter"]
    kind = ["--type", "preference"] if config.has_pairs else kind
    command = children.python("-m", "jllm.raw2ids", "--input", str(path), "--output", str(output))
    command += ["--tokenizer", str(config.model), "--max_len", str(row), *kind]
    # The converter is a program of its own, not a rank of this run.
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    environment = children.environment(environment)
    say(f"converting {path} to {output}", flush=True)
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        reason = lines[-1].removeprefix("error: ") if done.returncode == EXIT_CODE else " | ".join(lines[-3:])
        raise UserError(f"{path} could not be converted: {reason}")
    return dataclasses.replace(given, folder=output)


def _is_text(path: Path) -> bool:
    """Whether a file holds documents; JSON does where its first record has a `text`."""
    import fsspec
    import orjson

    if ".txt" in path.suffixes:
        return True
    with fsspec.open(str(path), "rb", compression="infer") as file:
        start = file.readline(1 << 24).lstrip(b"\xef\xbb\xbf \t\r\n[").rstrip(b"\r\n,] \t")
    try:
        record = orjson.loads(start)
    except orjson.JSONDecodeError:
        return False  # a list over several lines, or a broken line, which the converter names
    return isinstance(record, dict) and isinstance(record.get("text"), str)


def read_training_steps(data: Data, config: TrainConfig, cursor: Cursor) -> Iterator[Step] | ReadAhead | None:
    """This pipeline's steps from the cursor on; None where the process does not read."""
    if data.index is None:
        return None
    ahead = config.num_workers > 0
    steps = train_steps(
        data.index,
        data.share,
        seed=config.seed,
        shuffle=not config.no_shuf,
        cursor=cursor,
        ahead=ahead,
        parts=data.parts,
    )
    return ReadAhead(steps) if ahead else steps
