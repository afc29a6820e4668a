"""Whether a model can be trained on data sets, by what their manifests say, and else by their rows.

What a manifest does not know is met where the rows are read, with file and row (`jllm.train.data.loader`).

Cost: none but for a set whose manifest does not count trained tokens: that one is read up to the first.
"""

from collections.abc import Sequence

from jllm.data.dataset.columns import CONTROL_CLASS, REF_LOGPS
from jllm.data.dataset.manifest import PREFERENCE, DataSet
from jllm.data.dataset.reader import ShardReader
from jllm.data.dataset.token_counts import count_trained
from jllm.errors import UserError
from jllm.models.weights.source import ModelInfo
from jllm.train.config import TrainConfig, WeightedFolder
from jllm.train.data.batching import padded_length


def check_data_sets(
    given: Sequence[WeightedFolder], sets: Sequence[DataSet], config: TrainConfig, model: ModelInfo
) -> None:
    """Refuse what no step could be made of.

    Args:
        given: the folders with their weights, and the sets in them in the same order.
        sets: the data sets.
        config: the options.
        model: what it can take.

    Raises:
        UserError: ids that the model does not have, rows that are too long for it or for the options, a set of which
            nothing is trained on, or a weight that leaves no row of it.
    """
    for each, data_set in zip(given, sets, strict=True):
        check_ids(data_set, model.vocab_size)
        _check_length(data_set, config, model)
        _check_kind(data_set, config)
        if config.has_control:
            _check_classes(data_set)
        if data_set.manifest.rows == 0:
            raise UserError(f"{data_set.folder}: the data set has no rows; make it again from input that is not empty")
        if data_set.manifest.rows * each.weight < 1:
            raise UserError(
                f"--train_data {each.folder}={each.weight:g}: of {data_set.manifest.rows:,} rows that leaves none; give"
                f" at least {1 / data_set.manifest.rows:.2g}, or leave the set out"
            )
        if not has_targets(data_set):
            raise UserError(
                f"no token of {data_set.folder} is a target (labels mask them all, or rows have one token); give a set"
                " with something to predict"
            )
    if config.needs_reference:
        _check_references(sets)


def _check_kind(data_set: DataSet, config: TrainConfig) -> None:
    """Refuse pairs where single rows are trained on, and the reverse; pairs without what the loss compares with.

    Raises:
        UserError: as said.
    """
    kind, further, folder = data_set.manifest.kind, data_set.manifest.further, data_set.folder
    if not config.has_pairs:
        if kind == PREFERENCE or REF_LOGPS in further.carried:
            raise UserError(
                f"{folder} has preference pairs, of which --loss {config.loss} would train on the rejected answers too;"
                " give --loss dpo, or another one of pairs"
            )
        return
    asked = f"--loss {config.loss}" if config.is_preference else "--write_ref_logps"
    if kind not in (PREFERENCE, None):
        raise UserError(
            f"{asked} takes preference pairs, and {folder} has {kind}; make the shards with raw2ids -t preference"
        )
    if not config.needs_reference:
        return
    again = f"--model {config.model} --train_data {folder} --write_ref_logps FOLDER"
    if (REF_LOGPS in further.carried) != (data_set.manifest.reference is not None):
        raise UserError(
            f"{folder}: nothing says which model made its {REF_LOGPS.name}; make them again with: jllm train {again}"
        )
    if data_set.manifest.reference is None and not config.has_adapters:
        raise UserError(
            f"{asked} compares with a reference, and {folder} has none (no column {REF_LOGPS.name}); make them with:"
            f" jllm train {again}, and train on that folder; or give --loss orpo or simpo, or --lora_dim"
        )


def _check_references(sets: Sequence[DataSet]) -> None:
    """Raises:
    UserError: sets whose references are of several models, or that some have and others have not.
    """
    first = sets[0]
    for data_set in sets[1:]:
        if data_set.manifest.reference != first.manifest.reference:
            raise UserError(
                f"{first.folder} and {data_set.folder} do not have {REF_LOGPS.name} of the same model; make those of"
                " both with the same --write_ref_logps"
            )


def warnings_about_rows(sets: Sequence[DataSet], model: ModelInfo) -> list[str]:
    """What is odd about the lengths of rows without being wrong, one line each."""
    found = []
    for data_set in sets:
        longest, most = data_set.manifest.longest_row, model.rotary_positions
        if longest is not None and most is not None and longest - 1 > most:
            found.append(
                f"{data_set.folder} has rows of {longest:,} tokens, and the model has seen positions up to {most:,}"
                " (max_position_embeddings): beyond them it starts from nothing"
            )
    return found


def _check_classes(data_set: DataSet) -> None:
    """Look for control classes, and at their range, by the files' footers.

    Raises:
        UserError: there are none, some that are no classes, or nothing but 0.
    """
    found = data_set.manifest.further.types.get(CONTROL_CLASS.name)
    if found != CONTROL_CLASS.type_name:
        raise UserError(
            f"--control_adapter_rank: {data_set.folder} has "
            + (f"no column {CONTROL_CLASS.name}" if found is None else f"{CONTROL_CLASS.name} of type {found}")
            + "; make its classes with raw2ids --control_class"
        )
    low, high, is_known = 0, 0, True
    for path in data_set.paths:
        reader = ShardReader(path)
        _, limits = reader.elements(CONTROL_CLASS.name)
        reader.close()
        is_known = is_known and limits is not None
        low, high = min(low, limits[0] if limits else 0), max(high, limits[1] if limits else 0)
    if low < -1 or high > 1:
        raise UserError(
            f"--control_adapter_rank: {data_set.folder} has control class {low if low < -1 else high}; classes are 1,"
            " -1 and 0"
        )
    if is_known and low == high == 0:
        raise UserError(
            f"--control_adapter_rank: every control class of {data_set.folder} is 0, where adapters are off, so nothing"
            " would be trained; give some files +1 or -1 with raw2ids --control_class"
        )


def warnings_about_columns(sets: Sequence[DataSet], config: TrainConfig) -> list[str]:
    """Columns with a meaning of which a run makes no use, one line each."""
    found = [
        f"{data_set.folder} has {REF_LOGPS.name}, which --loss {config.loss} does not look at"
        for data_set in sets
        if REF_LOGPS in data_set.manifest.further.carried and config.is_preference and not config.needs_reference
    ]
    return found + [
        f"{data_set.folder} has control classes, which only --control_adapter_rank looks at"
        for data_set in sets
        if CONTROL_CLASS in data_set.manifest.further.carried and not config.has_control
    ]


def check_ids(data_set: DataSet, vocab_size: int) -> None:
    """Refuse ids that the model has no embedding for, as far as the manifest knows them; the loader meets the rest."""
    for entry in data_set.manifest.files:
        if entry.largest_id is not None and entry.largest_id >= vocab_size:
            raise UserError(
                f"{data_set.folder / entry.path}: token id {entry.largest_id} in the data: the model has ids from 0 to"
                f" {vocab_size - 1}; make the shards with the model's tokenizer"
            )


def _check_length(data_set: DataSet, config: TrainConfig, model: ModelInfo) -> None:
    longest = data_set.manifest.longest_row
    if longest is None:
        return
    if config.seq_len is not None and longest - 1 > config.seq_len:
        raise UserError(
            f"--seq_len {config.seq_len}: {data_set.folder} has rows of {longest} tokens;"
            f" give --seq_len {longest - 1}, or make shards with --max_len {config.seq_len + 1}"
        )
    if model.learned_positions is not None and longest - 1 > model.learned_positions:
        raise UserError(
            f"{data_set.folder} has rows of {longest} tokens, and the model has learned positions for"
            f" {model.learned_positions}; make shards with --max_len {model.learned_positions + 1}"
        )
    budget = config.batch_size_tokens
    if budget is not None and (needed := padded_length(longest - 1, model.longest_input(config.seq_len))) > budget:
        raise UserError(
            f"--batch_size_tokens {budget}: {data_set.folder} has rows of {longest} tokens, which are {needed} with"
            " their padding; give at least that"
        )


def has_targets(data_set: DataSet) -> bool:
    """Whether any token of a set is trained on; reads up to the first one where the manifest does not say."""
    known = data_set.manifest.total("trained_tokens")
    if known is not None:
        return known > 0
    for path in data_set.paths:
        reader = ShardReader(path)
        found = any(count_trained(batch) for batch in reader)
        reader.close()
        if found:
            return True
    return False


def check_batch(config: TrainConfig, *, rows: int, step_rows: int, longest_row: int | None) -> None:
    """Refuse steps that are larger than an epoch: every one of them would be filled up, and memory with it.

    Args:
        config: the options.
        rows: of an epoch.
        step_rows: rows of a step, over all pipelines.
        longest_row: in tokens; None where that is not known.

    Raises:
        UserError: as said.
    """
    if config.batch_size_tokens is None:
        if step_rows > rows:
            raise UserError(
                f"a step of {step_rows:,} rows (--per_device_train_batch_size x --gradient_accumulation_steps x"
                f" pipelines, or --global_batch_size) is more than an epoch, which has {rows:,}; give smaller ones"
            )
        return
    if longest_row is not None and config.batch_size_tokens > rows * padded_length(longest_row - 1, None):
        raise UserError(
            f"--batch_size_tokens {config.batch_size_tokens}: the {rows:,} rows of an epoch have at most"
            f" {longest_row:,} tokens each; give at most {rows * padded_length(longest_row - 1, None)}"
        )
    if config.gradient_accumulation_steps is not None and config.gradient_accumulation_steps > rows:
        raise UserError(
            f"--gradient_accumulation_steps {config.gradient_accumulation_steps}: an epoch has {rows:,} rows, so that"
            " most micro-batches would be empty; give less"
        )
