"""Checkpoints while training goes on, and which of them are kept.

With `--background_executor process` (the default) training waits only until its tensors are in host memory: a forked
child then sees them as they were, writes them and ends, while the parent goes on. The child of rank 0 waits for all
processes' parts, writes the index, and removes what is no longer kept. `thread` does the same in a thread, on a
copy; `none` writes before training goes on. One checkpoint is written at a time: a second one waits for the first.

A child dies with its parent, so a killed run leaves nothing behind that still writes. A failed child ends the run
at the next checkpoint or at the end, whichever comes first.

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

from torch import Tensor

from jllm.errors import UserError
from jllm.train import checkpoint
from jllm.train.checkpoint import RunState
from jllm.train.config import TrainConfig
from jllm.train.state import Piece

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
            checkpoint.remove_incomplete(self.root)
        barrier()

    def save(self, pieces: Sequence[Piece], rng: dict[str, Tensor], state: RunState) -> Path:
        """Begin a checkpoint after `state.step`; every process calls it. Returns the folder that will be there."""
        self.wait()
        folder = checkpoint.folder_of_step(self.root, state.step)
        if self._completes:
            checkpoint.remove_incomplete(self.root)
            checkpoint.temporary_folder(folder).mkdir(parents=True)
        self._barrier()
        executor = self._config.background_executor
        part = checkpoint.prepare_part(pieces, rng, copy=executor == "thread")

        def write() -> None:
            checkpoint.write_part(folder, self._rank, part)
            if self._completes:
                self._await_parts(folder)
                checkpoint.commit(folder, state, self._ranks)
                retain(self.root, max_num=self._config.max_num_checkpoints, best_of=self._config.best_of)

        if executor == "process":
            self._fork(write)
        elif executor == "thread":
            self._thread = threading.Thread(target=self._guarded, args=(write,), name="checkpoint")
            self._thread.start()
        else:
            write()
            self._barrier()
        return folder

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

    def _await_parts(self, folder: Path) -> None:
        deadline = time.monotonic() + self._config.timeout
        while missing := checkpoint.parts_missing(folder, self._ranks):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{missing} processes have not written their part of {folder}")
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
        child = os.fork()
        if child:
            self._child = child
            return
        # From here on: no tensor operations (their threads do not exist here), no imports, and no return.
        code = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
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


def retain(root: Path, *, max_num: int, best_of: int, model_only: bool = False) -> None:
    """Remove checkpoints that are neither among the newest `max_num` nor among the best `best_of` by evaluation loss.

    With both 0 all stay. A checkpoint without an evaluation counts as the worst. `model_only`: the checkpoints are
    those of `--only_ckpt_model`.
    """
    found = checkpoint.list_checkpoints(root, marker=checkpoint.MODEL_MARKER if model_only else checkpoint.INDEX_NAME)
    if not max_num and not best_of:
        return
    kept = set(found[-max_num:]) if max_num else set()
    if best_of:
        evaluated = checkpoint.EVALUATION_NAME if model_only else checkpoint.INDEX_NAME
        losses = {path: json.loads((path / evaluated).read_text(encoding="utf-8"))["eval_loss"] for path in found}
        # Among equals the newer one.
        ranked = sorted(found, key=lambda path: (_or_worst(losses[path]), -checkpoint.step_of_folder(path)))
        kept |= set(ranked[:best_of])
    for path in found:
        if path not in kept:
            checkpoint.remove_checkpoint(path)


def _or_worst(loss: float | None) -> float:
    return float("inf") if loss is None or loss != loss else loss
