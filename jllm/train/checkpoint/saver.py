"""Checkpoints while training goes on, and which of them are kept.

With `--background_executor process` (the default) training waits only until its tensors are in host memory: a forked
child then sees them as they were, writes them and ends, while the parent goes on. The child of rank 0 waits for all
processes' parts, writes the index, and removes what is no longer kept. `thread` does the same in a thread, on a
copy; `none` writes before training goes on. One checkpoint is written at a time: a second one waits for the first.

A child dies with its parent, and of nothing else that a run is asked to end by: SIGTERM to every process (SLURM's
notice) lets it finish, while its parent saves and ends. So a killed run leaves nothing behind that still writes. A
failed child ends the run at the next checkpoint or at the end, whichever comes first.

Cost of the pause: the copy from the device to host memory; on CPU, a fork (about 10 ms for each GiB).
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from jllm import atomic
from jllm.errors import UserError
from jllm.models.pipeline.stage import PipelineStage
from jllm.models.weights.saving import STAGE_METADATA, stage_files, write_companions, write_index
from jllm.models.weights.tensor_file import tensor_file
from jllm.train.checkpoint import folders
from jllm.train.checkpoint.format import Piece, RunState, commit, prepare_file, write_file
from jllm.train.config import TrainConfig

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
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
        self._child: int | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        # Looked up before any fork: loading a library in a forked child may wait for a lock that nobody holds any more.
        self._prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
        if self._completes:
            self.root.mkdir(parents=True, exist_ok=True)
            folders.remove_incomplete(self.root)
        barrier()

    def save(self, pieces: Sequence[Piece], rng: dict[str, Tensor], state: RunState) -> Path:
        """Begin a checkpoint after `state.step`; every process calls it. Returns the folder that will be there."""
        folder = self._begin(state.step)
        file = prepare_file(pieces, rng, copy=self._copies)

        def write() -> None:
            write_file(file, folder, self._rank)
            if self._completes:
                self._await([folders.receipt_path(folder, rank) for rank in self._ranks])
                commit(folder, state, self._ranks)
                retain(self.root, max_num=self._config.max_num_checkpoints, best_of=self._config.best_of)

        self._run(write)
        return folder

    def save_model(
        self,
        stage: PipelineStage,
        step: int,
        eval_loss: float | None,
        *,
        dtype: torch.dtype,
        writers: Sequence[int],
        chat_template: str | None = None,
    ) -> Path:
        """Begin a checkpoint that is a Hugging Face folder (`--only_ckpt_model`); every process calls it.

        Args:
            stage: of this process.
            eval_loss: of the newest evaluation.
            dtype: of the weights.
            writers: the processes that write the weights of their stage.
            chat_template: of the data.
        """
        assert self._config.model is not None
        folder = self._begin(step)
        temporary = folders.temporary_folder(folder)
        files = []
        if self._rank in writers:
            files = [
                (name, tensor_file(tensors, STAGE_METADATA, copy=self._copies))
                for name, tensors in stage_files(stage.model, stage.span, dtype=dtype)
            ]
        if self._completes:
            source = self._config.model
            write_companions(stage.model, temporary, dtype=dtype, source=source, chat_template=chat_template)

        def write() -> None:
            for name, file in files:
                file.write(temporary / name)
            if self._rank in writers:
                _mark(temporary, self._rank).touch()
            if self._completes:
                marks = [_mark(temporary, rank) for rank in writers]
                self._await(marks)
                for mark in marks:
                    mark.unlink()
                write_index(temporary)
                atomic.write_json(temporary / folders.EVALUATION_NAME, {"step": step, "eval_loss": eval_loss})
                folders.publish(folder)
                config = self._config
                retain(self.root, max_num=config.max_num_checkpoints, best_of=config.best_of, model_only=True)

        self._run(write)
        return folder

    def _begin(self, step: int) -> Path:
        """Wait for the checkpoint before, and make room for this one."""
        self.wait()
        folder = folders.folder_of_step(self.root, step)
        if self._completes:
            folders.remove_incomplete(self.root)
            folders.temporary_folder(folder).mkdir(parents=True)
        self._barrier()
        return folder

    @property
    def _copies(self) -> bool:
        """Whether tensors in host memory must be copied: a fork has its own, a thread does not."""
        return self._config.background_executor == "thread"

    def _run(self, write: Callable[[], None]) -> None:
        """Have `write` done by the executor."""
        if self._config.background_executor == "process":
            self._fork(write)
        elif self._config.background_executor == "thread":
            self._thread = threading.Thread(target=self._guarded, args=(write,), name="checkpoint")
            self._thread.start()
        else:
            write()
            self._barrier()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            UserError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._failure is not None:
                raise UserError(f"--checkpoint {self.root}: writing failed: {self._failure}")
        if self._child is not None:
            _, status = os.waitpid(self._child, 0)
            self._child = None
            if status != 0:
                raise UserError(f"--checkpoint {self.root}: writing failed on rank {self._rank}; the reason is above")

    def _await(self, paths: Sequence[Path]) -> None:
        deadline = time.monotonic() + self._config.timeout
        while missing := sum(not path.is_file() for path in paths):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{missing} processes have not written their part of {paths[0].parent}")
            time.sleep(_POLL_SECONDS)

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._failure = error

    def _fork(self, write: Callable[[], None]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        # A signal between the fork and the child's own settings would run the parent's handler in the child.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        child = os.fork()
        if child:
            self._child = child
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            return
        # From here on: no tensor operations (their threads do not exist here), no imports, and no return.
        code = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            if self._prctl is not None:
                self._prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
            if os.getppid() == parent:
                write()
                code = 0
        except OSError as error:
            print(f"rank {self._rank}: checkpoint: {error}", file=sys.stderr, flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


def _mark(folder: Path, rank: int) -> Path:
    """Says that process `rank` has written its part of a Hugging Face folder."""
    return folder / f".written-{rank:05d}"


def retain(root: Path, *, max_num: int, best_of: int, model_only: bool = False) -> None:
    """Remove checkpoints that are neither among the newest `max_num` nor among the best `best_of` by evaluation loss.

    The newest one always stays: it may be what somebody has just asked for. With both 0 all stay. A checkpoint between
    two evaluations carries the loss of the one before; of those that carry the same loss the first is the one that was
    evaluated, or the nearest to it, and the others count only where too few remain. A checkpoint without an evaluation
    counts as the worst. `model_only`: the checkpoints are those of `--only_ckpt_model`.
    """
    found = folders.list_checkpoints(root, marker=folders.MODEL_MARKER if model_only else folders.INDEX_NAME)
    if not max_num and not best_of:
        return
    kept = set(found[-max(max_num, 1) :])
    if best_of:
        evaluated = folders.EVALUATION_NAME if model_only else folders.INDEX_NAME
        losses = [_or_worst(json.loads((path / evaluated).read_text(encoding="utf-8"))["eval_loss"]) for path in found]
        carried = [loss in losses[:place] for place, loss in enumerate(losses)]
        # Among equals the newer one.
        ranked = sorted(range(len(found)), key=lambda place: (carried[place], losses[place], -place))
        kept |= {found[place] for place in ranked[:best_of]}
    for path in found:
        if path not in kept:
            folders.remove_checkpoint(path)


def _or_worst(loss: float | None) -> float:
    return float("inf") if loss is None or loss != loss else loss
