"""The checkpoints of a run: begun, written or not, tried again, and what is said of each.

A checkpoint is begun between two steps and written in the background. How it comes along is a request of each process
(`jllm.train.lifecycle.requests`), so all processes know at the end of the next step that it is written, or that it is
not. Then what is half written is removed, and one more is begun at once, after the retention has made room. Where that
fails too the run ends, and says which checkpoints there are.
"""

import time
from pathlib import Path

from jllm.errors import EXIT_CODE, UserError
from jllm.models.pipeline.stage import PipelineStage
from jllm.models.weights.saving import ExportedFolder
from jllm.train.checkpoint import folders
from jllm.train.checkpoint.format import RunState
from jllm.train.checkpoint.random_state import random_states
from jllm.train.checkpoint.saver import CheckpointSaver, ranked
from jllm.train.checkpoint.state import TrainingState
from jllm.train.checks.room import check_room
from jllm.train.config import TrainConfig
from jllm.train.distributed.agreement import Agreement
from jllm.train.lifecycle.ending import AGAIN_EXIT_CODE
from jllm.train.lifecycle.requests import Request
from jllm.train.records.metrics import Recorder


class RunSaver:
    """Writes the checkpoints of a run; every process calls its methods at the same steps.

    Args:
        config: the options, with a `--checkpoint`.
        agreement: the processes.
        state, stage: what is saved.
        kind: of the folders of `--only_ckpt_model` and `--only_ckpt_lora`.
        chat_template: of the data.
    """

    def __init__(
        self,
        config: TrainConfig,
        agreement: Agreement,
        state: TrainingState,
        stage: PipelineStage,
        kind: ExportedFolder,
        *,
        chat_template: str | None,
    ) -> None:
        assert config.checkpoint is not None
        self.root = config.checkpoint
        self._config, self._agreement, self._state, self._stage = config, agreement, state, stage
        self._kind, self._chat_template = kind, chat_template
        self.saves_alone = not agreement.sees_one_folder(config.checkpoint)
        ranks = agreement.ranks_of_node() if self.saves_alone else agreement.mesh.ranks
        self._saver = CheckpointSaver(config, rank=agreement.rank, ranks=ranks, barrier=agreement.barrier)
        self._folder: Path | None = None
        self._begun = 0.0
        self._is_retry = False
        self.newest_step: int | None = None

    def request(self) -> Request:
        """What this process tells the others of the checkpoint that is being written."""
        if self._folder is None:
            return Request.NOTHING
        if not self._saver.is_done():
            return Request.WRITING
        return Request.FAILED if self._saver.failure is not None else Request.NOTHING

    def save(self, run: RunState, recorder: Recorder) -> None:
        """Begin a checkpoint of the run as it is; the one before is waited for."""
        self.finish(run, recorder)
        self._begin(run, recorder)

    def _begin(self, run: RunState, recorder: Recorder) -> None:
        self._begun = time.perf_counter()
        if self._config.only_exports:
            with self._state.averaged():
                self._folder = self._saver.save_model(
                    self._stage,
                    run.step,
                    run.eval_loss,
                    self._kind,
                    writers=self._agreement.mesh.writers,
                    chat_template=self._chat_template,
                )
        else:
            self._folder = self._saver.save(self._state.pieces(alone=self.saves_alone), random_states(), run)
        self.newest_step = run.step
        seconds = time.perf_counter() - self._begun
        line = f"checkpoint {self._folder} started after {seconds:.2f} s of waiting"
        recorder.event("checkpoint_started", line, step=run.step, checkpoint=str(self._folder), seconds=seconds)

    def hear(self, everyone: Request, run: RunState, recorder: Recorder) -> None:
        """Take what all told at the end of a step.

        Args:
            everyone: what all told.
            run: as it is now, which a second try saves.
            recorder: is told what happened.

        Raises:
            UserError: on every process: the second try failed too.
        """
        if self._folder is None:
            return
        if Request.FAILED in everyone:
            self._try_again(run, recorder)
        elif Request.WRITING not in everyone:
            seconds = time.perf_counter() - self._begun
            line = f"checkpoint {self._folder} written after {seconds:.1f} s"
            recorder.event("checkpoint_written", line, step=run.step, checkpoint=str(self._folder), seconds=seconds)
            recorder.artefact("checkpoint", self._folder, step=folders.step_of_folder(self._folder))
            self._folder, self._is_retry = None, False

    def finish(self, run: RunState, recorder: Recorder) -> None:
        """Wait until all processes have written the newest checkpoint. Raises as `hear`."""
        while self._folder is not None:
            # A part that failed elsewhere is never waited for by the one that completes the checkpoint.
            told = Request.WRITING
            while told & Request.WRITING and not told & Request.FAILED:
                time.sleep(0.05)
                told = Request.NOTHING
                for each in self._agreement.gather(int(self.request())):
                    told |= Request(each)
            self.hear(told, run, recorder)

    def _try_again(self, run: RunState, recorder: Recorder) -> None:
        folder, was_retry = self._folder, self._is_retry
        failure = self._agreement.gather_first(lambda: self._saver.failure)
        self._saver.give_up()
        self._folder = None
        again = "" if was_retry else "; it is tried once more"
        line = f"warning: checkpoint {folder} could not be written: {failure}{again}"
        recorder.event("checkpoint_failed", line, step=run.step, checkpoint=str(folder), reason=failure)
        if was_retry:
            found = self.complete()
            there = f"the newest of {len(found)} that are complete is {found[-1]}" if found else "no other one is there"
            raise UserError(
                f"--checkpoint {self.root}: {folder} could not be written: {failure}; {there}",
                # A disk that is full for a while; one that stays so is found by the next start.
                exit_code=AGAIN_EXIT_CODE if found and self._config.saves_state else EXIT_CODE,
            )
        self._saver.make_room()
        self._agreement.barrier()
        self._is_retry = True
        self._begin(run, recorder)

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return folders.list_checkpoints(self.root, marker=folders.marker_of(self._config))

    def best(self) -> Path | None:
        """The complete checkpoint with the lowest evaluation loss."""
        return next(iter(ranked(self.complete(), marker=folders.marker_of(self._config))), None)


def saver_of_run(
    config: TrainConfig,
    agreement: Agreement,
    state: TrainingState,
    stage: PipelineStage,
    kind: ExportedFolder,
    *,
    chat_template: str | None,
) -> RunSaver | None:
    """What saves a run that has a `--checkpoint`, by the arguments of `RunSaver`. With or without one, all that the
    run writes has room at its start.

    Raises:
        UserError: on every process: a disk is too full.
    """
    saver = None
    if config.checkpoint is not None:
        saver = RunSaver(config, agreement, state, stage, kind, chat_template=chat_template)
    check_room(config, agreement, stage, kind, alone=saver is not None and saver.saves_alone)
    return saver
