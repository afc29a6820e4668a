"""Checkpoints while training goes on, and which of them are kept.

With `--background_executor process` (the default) training waits only until its tensors are in host memory: a forked
child then sees them as they were, writes them and ends, while the parent goes on. The child of the first process waits
for all processes' parts, writes the index, and removes what is no longer kept. `thread` does the same in a thread, on a
copy; `none` writes before training goes on. One checkpoint is written at a time: a second one waits for the first.

Guarantees: a checkpoint that could not be written leaves nothing behind once it is given up.
Cost of the pause: the copy from the device to host memory; on CPU, a fork.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from jllm import atomic
from jllm.guards import notation
from jllm.models.pipeline.stage import PipelineStage
from jllm.models.weights.saving import STAGE_METADATA, ExportedFolder
from jllm.models.weights.tensor_file import tensor_file
from jllm.train.checkpoint import folders
from jllm.train.checkpoint.background import Background
from jllm.train.checkpoint.format import Piece, RunState, commit, prepare_file, write_file
from jllm.train.config import TrainConfig

_POLL_SECONDS = 0.05


class CheckpointSaver:
    """Saves checkpoints of one process's part of a run.

    Args:
        config: folder, executor and retention.
        rank: of this process.
        ranks: that write to the same folder, which the first of them completes: all of the run, or those of one node
            where each node has a folder of its own.
        barrier: waits for all processes.
    """

    def __init__(self, config: TrainConfig, *, rank: int, ranks: Sequence[int], barrier: Callable[[], None]) -> None:
        assert config.checkpoint is not None
        self.root = config.checkpoint
        self._config = config
        self._rank, self._ranks = rank, ranks
        self._completes = rank == ranks[0]
        self._barrier = barrier
        self._background = Background(config.background_executor)
        if self._completes:
            self.root.mkdir(parents=True, exist_ok=True)
            folders.remove_incomplete(self.root)
        barrier()

    def save(self, pieces: Sequence[Piece], rng: dict[str, Tensor], state: RunState) -> Path:
        """Begin a checkpoint after `state.step`; every process calls it. Returns the folder that will be there."""
        folder = folders.folder_of_step(self.root, state.step)
        failure = self._make_folder(folder)
        self._barrier()
        file = prepare_file(pieces, rng, copy=self._background.copies)

        def write() -> None:
            _raise(failure)
            write_file(file, folder, self._rank)
            if self._completes:
                self._await([folders.receipt_path(folder, rank) for rank in self._ranks])
                commit(folder, state, self._ranks)
                retain(self.root, max_num=self._config.max_num_checkpoints, best_of=self._config.best_of)

        self._background.begin(write)
        return folder

    def save_model(
        self,
        stage: PipelineStage,
        step: int,
        eval_loss: float | None,
        kind: ExportedFolder,
        *,
        writers: Sequence[int],
        chat_template: str | None = None,
    ) -> Path:
        """Begin a checkpoint that is a folder of the model or the adapters; every process calls it.

        Args:
            stage: of this process.
            eval_loss: of the newest evaluation.
            kind: of the folder.
            writers: the processes that write the weights of their stage.
            chat_template: of the data.
        """
        folder = folders.folder_of_step(self.root, step)
        failure = self._make_folder(folder)
        self._barrier()
        temporary = folders.temporary_folder(folder)
        files = []
        if self._rank in writers:
            files = [
                (name, tensor_file(tensors, STAGE_METADATA, copy=self._background.copies))
                for name, tensors in kind.stage_files(stage.model, stage.span)
            ]
        if self._completes and failure is None:
            try:
                kind.write_companions(stage.model, temporary, chat_template=chat_template)
            except OSError as error:
                failure = error

        def write() -> None:
            _raise(failure)
            for name, file in files:
                file.write(temporary / name)
            if self._rank in writers:
                _mark(temporary, self._rank).touch()
            if self._completes:
                marks = [_mark(temporary, rank) for rank in writers]
                self._await(marks)
                for mark in marks:
                    mark.unlink()
                kind.complete(temporary)
                atomic.write_json(temporary / folders.EVALUATION_NAME, {"step": step, "eval_loss": eval_loss})
                folders.publish(folder)
                config = self._config
                retain(self.root, max_num=config.max_num_checkpoints, best_of=config.best_of, marker=kind.marker)

        self._background.begin(write)
        return folder

    def is_done(self, *, wait: bool = False) -> bool:
        """Whether this process's part of the newest checkpoint is written or has failed. `wait`: until it is."""
        return self._background.is_done(wait=wait)

    @property
    def failure(self) -> str | None:
        """Why this process's part could not be written, in a line; None where it is, or is being written."""
        return self._background.failure

    def give_up(self) -> None:
        """End the writing, and remove what is half written; every process calls it."""
        self._background.give_up()
        self._barrier()
        if self._completes:
            folders.remove_incomplete(self.root)
        self._barrier()

    def make_room(self) -> None:
        """Remove what the retention would remove after one more checkpoint. At least one stays."""
        config = self._config
        if self._completes and config.max_num_checkpoints > 1:
            most = config.max_num_checkpoints - 1
            retain(self.root, max_num=most, best_of=config.best_of, marker=folders.marker_of(config))

    def _make_folder(self, folder: Path) -> OSError | None:
        """Make room for a checkpoint; why that did not work, if it did not."""
        if self._completes:
            try:
                folders.remove_incomplete(self.root)
                folders.temporary_folder(folder).mkdir(parents=True)
            except OSError as error:
                return error
        return None

    def _await(self, paths: Sequence[Path]) -> None:
        deadline = time.monotonic() + self._config.timeout
        while missing := sum(not path.is_file() for path in paths):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{missing} processes have not written their part of {paths[0].parent}")
            time.sleep(_POLL_SECONDS)


def _raise(failure: OSError | None) -> None:
    if failure is not None:
        raise failure


def _mark(folder: Path, rank: int) -> Path:
    """Says that process `rank` has written its part of a Hugging Face folder."""
    return folder / f".written-{rank:05d}"


def retain(root: Path, *, max_num: int, best_of: int, marker: str = folders.INDEX_NAME) -> None:
    """Remove checkpoints that are neither among the newest `max_num` nor among the best `best_of` by evaluation loss.

    The newest one always stays: it may be what somebody has just asked for. With both 0 all stay. A checkpoint between
    two evaluations carries the loss of the one before; of those that carry the same loss the first is the one that was
    evaluated, or the nearest to it, and the others count only where too few remain. A checkpoint without an evaluation
    counts as the worst. `marker` is what makes one complete.
    """
    found = folders.list_checkpoints(root, marker=marker)
    if not max_num and not best_of:
        return
    kept = set(found[-max(max_num, 1) :])
    if best_of:
        kept |= set(ranked(found, marker=marker)[:best_of])
    for path in found:
        if path not in kept:
            folders.remove_checkpoint(path)


def ranked(found: Sequence[Path], *, marker: str = folders.INDEX_NAME) -> list[Path]:
    """Checkpoints, given oldest first, by evaluation loss, the best first, as `retain` counts them."""
    evaluated = folders.INDEX_NAME if marker == folders.INDEX_NAME else folders.EVALUATION_NAME
    losses = [_or_worst(notation.read_json(path / evaluated)["eval_loss"]) for path in found]
    carried = [loss in losses[:place] for place, loss in enumerate(losses)]
    # Among equals the newer one.
    order = sorted(range(len(found)), key=lambda place: (carried[place], losses[place], -place))
    return [found[place] for place in order]


def _or_worst(loss: float | None) -> float:
    return float("inf") if loss is None or loss != loss else loss
