"""`--write_ref_logps`: a data set of preference pairs with the log-probabilities of their answers under the model.

The model runs forward over the set, over any stages and pipelines. Every file comes out under its own name with two
columns more: `ref_logps`, one fp32 number a document, and `ref_labels`, the row's checksum
(`jllm.data.packing.pair_rows`). The manifest says what made them (`jllm.train.preference.identity`), and a hash of the
checksums of all rows.

Guarantees: batches never cross files, so that what a killed run had finished is what an undisturbed one makes, to the
byte. A file that is named in the state is whole and never written again. Nothing is written into the source.
Cost: a forward pass over the set, without an optimizer; on the first process the numbers of one file.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jllm import atomic
from jllm.data.dataset.columns import (
    COLUMNS,
    REF_LABELS,
    REF_LOGPS,
    Column,
    conform,
    from_list_array,
    schema,
    to_array,
    to_list_array,
)
from jllm.data.dataset.files import CODECS, footer_of
from jllm.data.dataset.further import FurtherColumns
from jllm.data.dataset.manifest import (
    PREFERENCE,
    DataSet,
    FileEntry,
    Manifest,
    entry_of_written,
    open_data_set,
    read_manifest,
    write_manifest,
)
from jllm.data.dataset.reader import ShardReader
from jllm.data.dataset.shards import ShardWriter
from jllm.data.packing.pair_rows import row_checksum
from jllm.errors import UserError, say
from jllm.guards.typed import MALFORMED, check_fields
from jllm.models.weights.source import ModelInfo
from jllm.parallel import peers
from jllm.train import setup
from jllm.train.config import TrainConfig, weighted_folders
from jllm.train.data.loader import eval_micro_batches, eval_steps
from jllm.train.data.open import Data, open_training_data
from jllm.train.data.rows import ShardIndex
from jllm.train.distributed.agreement import Agreement
from jllm.train.distributed.deepspeed_engine import TrainingEngine, build_engine
from jllm.train.evaluate import MICRO_BATCHES_PER_STAGE
from jllm.train.fused_loss import wants_fused_loss
from jllm.train.objectives.objective import ObjectiveInUse
from jllm.train.objectives.preference import ReferenceLogps
from jllm.train.optim.optimizers import build_optimizer
from jllm.train.preference.identity import reference_identity
from jllm.train.shape import RunShape

COMMAND = "train_pipe --write_ref_logps"
WORK_NAME = ".ref_logps"
OURS = (REF_LOGPS.name, REF_LABELS.name)
_STATE = "state.json"
Float32 = NDArray[np.float32]


def write_references(config: TrainConfig, shape: RunShape, agreement: Agreement, model: ModelInfo) -> None:
    """Make the set of `config`, or finish it, or find it finished; every process calls it.

    Raises:
        UserError: on every process: no pairs, a model that cannot take them, or a folder that holds something else.
    """
    [given] = weighted_folders(config)
    agreement.from_first_reader(lambda: check_target(config))
    data = open_training_data(config, shape, agreement, model)
    family = setup.find_family(config)
    source = agreement.from_first_reader(lambda: open_data_set(given.folder).manifest)
    work = _ReferenceWork(config, source)
    identity = agreement.from_first_reader(lambda: reference_identity(config, attention=family.kernel))
    with _held(work, identity, agreement) as finished:
        if finished is not None:
            _say(agreement, f"{work.folder}: finished earlier: {finished.rows:,} rows")
        else:
            _write(work, identity, config, shape, agreement, data)
    peers.leave()
    agreement.barrier()


def check_target(config: TrainConfig) -> None:
    """Raises:
    UserError: the folder of the set that is written is, or lies in, that of the set it is made of, or around it.
    """
    assert config.write_ref_logps is not None
    [given] = weighted_folders(config)
    target, source = config.write_ref_logps.resolve(), given.folder.resolve()
    if not source.is_dir():
        raise UserError(
            f"--train_data {given.folder}: --write_ref_logps reads a folder of shards; make one with raw2ids"
        )
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise UserError(f"--write_ref_logps {config.write_ref_logps}: lies in --train_data or around it; give another")


def _write(
    work: "_ReferenceWork",
    identity: dict[str, Any],
    config: TrainConfig,
    shape: RunShape,
    agreement: Agreement,
    data: Data,
) -> None:
    in_use = ObjectiveInUse(ReferenceLogps())
    built = setup.build_stage(config, shape, agreement, in_use, longest_row=data.facts.longest_row)
    engine = build_engine(built.stage, build_optimizer(built.stage, config, attached=built.attached), config, shape)
    for line in (built.plan.table, *built.plan.notes):
        _say(agreement, line)
    forward = _Forward(engine, in_use, agreement, data, is_fused=wants_fused_loss(config))
    done = agreement.from_first_reader(lambda: len(work.entries))
    files = work.source.files
    for number in range(done, len(files)):
        found = forward.over(files[number], DataSet(folder=work.source_folder, manifest=work.source))
        agreement.from_first_reader(lambda number=number, found=found: work.write_file(files[number], found))  # type: ignore[misc]
        _say(agreement, f"{number + 1} of {len(files)} files: {files[number].path}")
    agreement.from_first_reader(lambda: work.finish(identity))
    _say(agreement, f"wrote {work.folder}: train on it with --train_data {work.folder}")


class _Forward:
    """The model over one file after another."""

    def __init__(
        self, engine: TrainingEngine, in_use: ObjectiveInUse, agreement: Agreement, data: Data, *, is_fused: bool
    ) -> None:
        self._engine, self._in_use, self._agreement, self._is_fused = engine, in_use, agreement, is_fused
        self._reads = data.index is not None
        least = MICRO_BATCHES_PER_STAGE * engine.num_stages
        self._share = dataclasses.replace(
            data.share, accumulation=max(data.share.accumulation, least), longest=None, references=False
        )

    def over(self, entry: FileEntry, source: DataSet) -> list[Float32]:
        """The numbers of each row's documents, on the first process."""
        one = dataclasses.replace(source, manifest=dataclasses.replace(source.manifest, files=(entry,)))
        steps = eval_steps(ShardIndex(one), self._share) if self._reads and entry.rows else None
        rows: list[Float32] = []
        for count in eval_micro_batches(entry.rows, self._share):
            step, facts = self._agreement.step(steps)
            made = ReferenceLogps(is_fused=self._is_fused)
            self._in_use.use(made)
            self._engine.eval_step(step.micro_batches if step is not None else None, facts.length, count)
            numbers = [each.cpu().numpy().astype(np.float32) for each in made.found]
            documents = [each.documents for each in step.micro_batches] if step is not None else None
            everyone = self._agreement.gather((documents, [np.trim_zeros(each, "b") for each in numbers]))
            if self._agreement.place.is_first:
                for data in range(self._agreement.mesh.data):
                    rows += _of_pipeline(everyone, self._agreement, data)
        return rows


def _of_pipeline(everyone: list[Any], agreement: Agreement, data: int) -> Iterator[Float32]:
    """The rows of one pipeline in a step: its reader knows how many documents each has, its last stage the numbers."""
    mesh = agreement.mesh
    documents, _ = everyone[mesh.rank_at(data=data)]
    _, numbers = everyone[mesh.rank_at(data=data, pipe=mesh.pipe - 1)]
    for counts, found in zip(documents, numbers, strict=True):
        whole = np.zeros(sum(counts), np.float32)
        whole[: len(found)] = found
        at = 0
        for count in counts:
            if count:
                yield whole[at : at + count]
            at += count


class _ReferenceWork:
    """The folder that is written."""

    def __init__(self, config: TrainConfig, source: Manifest) -> None:
        assert config.write_ref_logps is not None
        self.folder, self.source = config.write_ref_logps, source
        self.source_folder = weighted_folders(config)[0].folder
        self.entries: list[FileEntry] = []
        self._labels = ""
        self._identity: dict[str, Any] = {}

    @property
    def work(self) -> Path:
        """What only an unfinished run needs."""
        return self.folder / WORK_NAME

    def plan(self, identity: dict[str, Any]) -> dict[str, Any]:
        """What the set is made of."""
        return {"fingerprint": self.source.fingerprint, "reference": identity}

    def take_up(self, identity: dict[str, Any]) -> None:
        """Begin, or go on from what a killed run left.

        Raises:
            UserError: the folder holds something else.
        """
        self._identity = identity
        state = atomic.read_object(self.work / _STATE, f"remove {self.work}")
        if state is None:
            if self.folder.is_dir() and any(each.name != WORK_NAME for each in self.folder.iterdir()):
                raise UserError(f"--write_ref_logps {self.folder}: is not empty; give another folder")
            self.work.mkdir(parents=True, exist_ok=True)
            self._save(identity)
            return
        if state.get("plan") != self.plan(identity):
            differs = _difference(state.get("plan"), self.plan(identity))
            raise UserError(
                f"--write_ref_logps {self.folder}: holds unfinished work of another kind ({differs}); remove it, or"
                " give another"
            )
        try:
            self.entries = [FileEntry(**entry) for entry in state["files"]]
            for entry, given in zip(self.entries, self.source.files, strict=False):
                check_fields(entry)
                if entry.path != given.path or footer_of(self.folder / entry.path) != entry.footer:
                    raise ValueError(f"{entry.path} is not what was written")
            self._labels = str(state["labels"])
        except (*MALFORMED, OSError) as error:
            raise UserError(
                f"{self.work / _STATE}: not what a run left there ({error}); remove {self.folder}"
            ) from None

    def _save(self, identity: dict[str, Any]) -> None:
        files = [dataclasses.asdict(entry) for entry in self.entries]
        atomic.write_json(self.work / _STATE, {"plan": self.plan(identity), "files": files, "labels": self._labels})

    def write_file(self, entry: FileEntry, numbers: list[Float32]) -> None:
        """Write a file of the source with the numbers of its rows."""
        reader = ShardReader(self.source_folder / entry.path)
        further = [each for each in reader.further.carried if each.name not in OURS]
        part = self.work / "part.parquet"
        codec = next((each for each in CODECS if f".{each}." in entry.path), "zstd")
        at, labels = 0, hashlib.sha256(self._labels.encode())
        with ShardWriter(part, columns=COLUMNS, further=[*further, REF_LOGPS, REF_LABELS], codec=codec) as writer:
            for batch in reader:
                some = numbers[at : at + batch.num_rows]
                kept = batch.select([name for name in batch.schema.names if name not in OURS])
                made = _with_references(conform(kept, COLUMNS, further), further, some)
                labels.update(made.column(REF_LABELS.name).to_numpy().tobytes())
                writer.write(made)
                at += batch.num_rows
        reader.close()
        assert at == len(numbers), f"{at} rows, numbers of {len(numbers)}"
        final = self.folder / entry.path
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, final)
        atomic.sync_file(final.parent)
        self.entries.append(entry_of_written(final, self.folder, writer.statistics))
        self._labels = labels.hexdigest()
        self._save(self._identity)

    def finish(self, identity: dict[str, Any]) -> None:
        """Write the manifest; what is only of unfinished work goes."""
        carried = [each for each in self.source.further.carried if each.name not in OURS]
        manifest = dataclasses.replace(
            self.source,
            command=COMMAND,
            options={},
            files=tuple(self.entries),
            sources=({"name": self.source_folder.resolve().name, "fingerprint": self.source.fingerprint},),
            further=FurtherColumns(
                carried=tuple(sorted([*carried, REF_LOGPS, REF_LABELS])), left_out=self.source.further.left_out
            ),
            labels_checked=True,
            kind=PREFERENCE,
            reference={**identity, "labels": self._labels},
        )
        write_manifest(self.folder, manifest)
        atomic.remove_tree(self.work)


def _with_references(batch: pa.RecordBatch, further: Sequence[Column], numbers: list[Float32]) -> pa.RecordBatch:
    """Rows with their numbers and checksums."""
    columns = {name: from_list_array(batch.column(name)) for name in COLUMNS}
    sums = np.empty(batch.num_rows, np.int32)
    for row in range(batch.num_rows):
        ids, labels, bounds = (
            values[offsets[row] : offsets[row + 1]] for values, offsets in (columns[name] for name in COLUMNS)
        )
        sums[row] = row_checksum(ids, labels, bounds)
        assert len(numbers[row]) == len(bounds) - 1, f"row {row}: {len(numbers[row])} numbers for {len(bounds) - 1}"
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in numbers])]).astype(np.int64)
    values = np.concatenate([np.empty(0, np.float32), *numbers]).astype(np.float32)
    made = dict(zip(batch.schema.names, batch.columns, strict=True))
    made |= {REF_LOGPS.name: to_list_array(values, offsets), REF_LABELS.name: to_array(sums)}
    wanted = schema(COLUMNS, [*further, REF_LOGPS, REF_LABELS])
    return pa.RecordBatch.from_arrays([made[name] for name in wanted.names], schema=wanted)


def _difference(found: Any, wanted: dict[str, Any]) -> str:
    """What of a plan is another one, for people."""
    before = {"fingerprint": None, **found, **found.get("reference", {})} if isinstance(found, dict) else {}
    after = {**wanted, **wanted["reference"]}
    names = [name for name in after if name != "reference" and before.get(name) != after[name]]
    said = {"fingerprint": "other data"}
    return ", ".join(
        said.get(name, f"{name} {str(before.get(name))[:12]}, not {str(after[name])[:12]}") for name in names
    )


@contextlib.contextmanager
def _held(work: _ReferenceWork, identity: dict[str, Any], agreement: Agreement) -> Iterator[Manifest | None]:
    """Keep other runs out of the folder, and take up what is there; the manifest, where all is done."""
    with contextlib.ExitStack() as held:

        def take() -> Manifest | None:
            manifest = read_manifest(work.folder) if work.folder.is_dir() else None
            if manifest is not None:
                reference = {name: value for name, value in (manifest.reference or {}).items() if name != "labels"}
                found = {"fingerprint": (manifest.sources or ({},))[0].get("fingerprint"), "reference": reference}
                if manifest.command != COMMAND or found != work.plan(identity):
                    what = _difference(found, work.plan(identity)) if manifest.command == COMMAND else manifest.command
                    raise UserError(
                        f"--write_ref_logps {work.folder}: holds another set ({what}); remove it, or give another"
                    )
                atomic.remove_tree(work.work, missing_ok=True)
                return manifest
            work.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(work.folder, os.O_RDONLY | os.O_DIRECTORY)
            held.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"--write_ref_logps {work.folder}: another run is at work there; wait for it") from None
            work.take_up(identity)
            return None

        yield agreement.from_first_reader(take)


def _say(agreement: Agreement, line: str) -> None:
    if agreement.place.is_first:
        say(line, flush=True)
