"""A training run, top to bottom."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch

from jllm import __version__
from jllm.errors import UserError, say
from jllm.models.weights.source import ModelInfo
from jllm.parallel import peers
from jllm.train import setup
from jllm.train.advice import filling_lines
from jllm.train.checkpoint.format import RunState
from jllm.train.checkpoint.random_state import Position, random_states, restore_random_states
from jllm.train.checkpoint.reader import CheckpointReader
from jllm.train.checkpoint.resume import (
    Intact,
    batching_rule,
    check_same_run,
    check_steps_left,
    check_weights,
    find_resume_points,
    first_intact,
    load_weights_only,
    optimizer_starts_afresh,
    other_length,
    record_of_run,
)
from jllm.train.checkpoint.run_saver import saver_of_run
from jllm.train.checkpoint.state import TrainingState
from jllm.train.checks.start import check_start
from jllm.train.config import TrainConfig, skipped_steps
from jllm.train.data.loader import Cursor, ReadAhead, Step
from jllm.train.data.open import Data, epoch_steps, open_training_data, planes_of, read_training_steps, warnings_of
from jllm.train.distributed import launch
from jllm.train.distributed.agreement import Agreement, StepFacts
from jllm.train.distributed.deepspeed_engine import build_engine, check_precision
from jllm.train.distributed.facts import join_alike
from jllm.train.distributed.profiling import watched_step
from jllm.train.dry_run import dry_run
from jllm.train.evaluate import Evaluation, evaluate, mean_loss, open_evaluation_sets, warnings_of_share
from jllm.train.exporting import convert, export_run, exported_folder, say_templates
from jllm.train.fused_loss import training_objective
from jllm.train.lifecycle.clean import remove_earlier_runs
from jllm.train.lifecycle.ending import PERSON_EXIT_CODE, Ending, StoppedError
from jllm.train.lifecycle.requests import Request, Requests
from jllm.train.lifecycle.run_folders import check_folders_are_free, check_model_folders, locked, run_id
from jllm.train.objectives.objective import ObjectiveInUse, step_scale
from jllm.train.optim.after_step import follow_updates, record_of_adapters
from jllm.train.optim.optimizers import build_optimizer
from jllm.train.optim.schedules import learning_rate, set_learning_rate, warmup_steps
from jllm.train.preference.identity import check_references
from jllm.train.preference.in_run import PairEvaluation, pairs_of_run
from jllm.train.preference.writing import write_references
from jllm.train.records.config_record import record_options
from jllm.train.records.metrics import Recorder
from jllm.train.records.sinks.choice import reporters_of
from jllm.train.records.step_record import record_of_step
from jllm.train.records.throughput import DeviceUse
from jllm.train.shape import RunShape, resolve_shape
from jllm.train.triggers import Cadence, EarlyStop, NanGuard, SpikeWatch


def run(config: TrainConfig) -> int:
    """The work of one process, from joining the others to the exported folder. Returns the exit code.

    Raises:
        UserError: impossible options, data or model; on every process, or on the one that met it.
    """
    if config.dry_run:
        dry_run(config)
        return 0
    shape = resolve_shape(config, launch.world_size())
    notes = check_start(config, shape)
    model_info = setup.read_model_info(config)
    join_alike(config, shape)
    check_precision(config)
    agreement = Agreement(shape.mesh, planes_of(config))
    if agreement.place.is_first:
        say(*notes, sep="\n", end="\n" * bool(notes), flush=True)
    if config.num_train_epochs == 0:
        convert(config, shape, agreement, model_info)
        return 0
    if config.write_ref_logps is not None:
        write_references(config, shape, agreement, model_info)
        return 0
    agreement.from_first_reader(lambda: check_folders_are_free(config))
    run = agreement.from_first_reader(lambda: run_id(config))
    with locked(config, agreement, run):
        training = TrainingRun(config, shape, agreement, model_info, run=run)
        with training.recorder.until_the_end():
            return training.train()


class TrainingRun:
    """One run on one process: what it holds between its steps."""

    def __init__(
        self, config: TrainConfig, shape: RunShape, agreement: Agreement, model_info: ModelInfo, *, run: str
    ) -> None:
        self.config, self.shape, self.agreement, self.model_info, self.id = config, shape, agreement, model_info, run
        if config.clean:
            remove_earlier_runs(config, agreement)
        candidates = find_resume_points(config, agreement)
        rule = batching_rule(candidates, agreement)
        self.data = open_training_data(config, shape, agreement, model_info, rule=rule)
        self.eval_data = open_evaluation_sets(config, shape, agreement, model_info)
        self.epochs = agreement.from_first_reader(
            lambda: epoch_steps(config, self.data.index, self.data.share, self.data.parts)
        )
        self.total_steps = config.max_steps or self.epochs.total(config.num_train_epochs)
        warmup_steps(config, self.total_steps)
        self.skipped = skipped_steps(config)
        check_model_folders(config, agreement)
        self.training = training_objective(config)
        self.objective = ObjectiveInUse(self.training)
        self.built = setup.build_stage(
            config, shape, agreement, self.objective, longest_row=self.data.facts.longest_row
        )
        self.stage, self.plan = self.built.stage, self.built.plan
        check_references(config, agreement, self.data, self.eval_data, attention=self.built.kernel)
        self.exported = exported_folder(config, model_info, self.built.adapters)
        if config.from_ckpt is not None:
            load_weights_only(self.stage, config, agreement)
        optimizer = build_optimizer(self.stage, config, attached=self.built.attached)
        self.after_step = follow_updates(config, self.stage.model, optimizer)
        self.engine = build_engine(self.stage, optimizer, config, shape)
        self.state = TrainingState(self.engine, self.stage, config.optimizer)
        self.step, self.cursor = 0, Cursor()
        self.consumed_tokens = self.consumed_rows = 0
        self.eval_loss: float | None = None
        self.evaluation_pending = True  # before the first step
        self.early_stop = EarlyStop(config.early_stop)
        self.record = record_of_run(config, shape, self.total_steps, rule=rule)
        self.fresh_optimizer = False
        self.other_length: str | None = None
        self.resumed: Intact | None = None
        if candidates:
            self._resume(candidates)
        self.had_ended = self.step == self.total_steps or self.early_stop.stops
        self.pairs = pairs_of_run(self.engine, self.objective, agreement, self.data, config, step=self.step)
        self.good = self._position()
        self.cadence = Cadence(config, epochs=self.epochs, total_steps=self.total_steps)
        self.requests = Requests(config, is_first=agreement.place.is_first, world_size=shape.mesh.world_size)
        self.nan_guard, self.spike_watch = NanGuard(config.on_nan), SpikeWatch()
        self.asked = self.told = Request.NOTHING
        self.saver = saver_of_run(
            config, agreement, self.state, self.stage, self.exported, chat_template=self.data.facts.chat_template
        )
        self.recorder = Recorder(
            config.resolved_log_dir,
            enabled=agreement.place.is_first,
            total_steps=self.total_steps,
            first_step=self.step + 1,
            steps_per_print=config.steps_per_print,
            evaluates_first=self.evaluation_pending,
            reporters=reporters_of(config, run) if agreement.place.is_first else (),
        )

    def train(self) -> int:
        """All steps, with evaluations and checkpoints between them, and the exported folder at the end; the exit code.

        Raises:
            UserError: on every process: training cannot go on, with `PERSON_EXIT_CODE` where the state is saved; or
                checkpoints cannot be written.
        """
        self._introduce()
        self.requests.listen()
        steps = read_training_steps(self.data, self.config, self.cursor) if not self.had_ended else None
        try:
            ending = self._make_steps(steps)
        except StoppedError as error:
            self._save_for_a_person(error)
        finally:
            if isinstance(steps, ReadAhead):
                steps.close()
        self._finish_saving()
        if self.config.output_dir is not None and ending.is_done:
            with self.state.averaged():
                export_run(
                    self.config,
                    self.agreement,
                    self.stage,
                    self.saver,
                    self.recorder,
                    self.exported,
                    chat_template=self.data.facts.chat_template,
                    step=self.step,
                    had_ended_at=self.resumed.reader.folder if self.resumed is not None and self.had_ended else None,
                )
        return self._leave(ending)

    def _make_steps(self, steps: Iterator[Step] | ReadAhead | None) -> Ending:
        """Train until the last step, or until something ends the run before it.

        Raises:
            StoppedError: on every process: training cannot go on.
        """
        if self.evaluation_pending and self._evaluate():
            return Ending.EARLY_STOP
        if self.early_stop.stops:
            return Ending.EARLY_STOP
        ending = self.requests.hear(self.asked)
        while ending is None and self.step < self.total_steps:
            self.asked = Request.NOTHING
            self._train_step(steps)
            self.evaluation_pending = self.cadence.evaluates(self.step)
            stops_early = self.evaluation_pending and self._evaluate()
            if stops_early:
                self.recorder.say(f"early stop: the evaluation loss rose {self.config.early_stop} times in a row")
            ending = Ending.EARLY_STOP if stops_early else self.requests.hear(self.asked)
            if self.saver is not None:
                self.saver.hear(self.told, self._run_state(), self.recorder)
            if ending is not None or Request.SAVE in self.asked or self.cadence.saves(self.step):
                self._save_checkpoint()
        return ending or Ending.COMPLETE

    def _save_for_a_person(self, error: StoppedError) -> NoReturn:
        """Save the state before what cannot be gone on from, and end."""
        self._go_back()
        if self.step > 0:
            self._save_checkpoint()
        self._finish_saving()
        if not self._is_saved:
            raise UserError(str(error))
        raise UserError(f"{error}; the state after step {self.step} is saved", exit_code=PERSON_EXIT_CODE)

    @property
    def _is_saved(self) -> bool:
        """Whether the same line goes on from here."""
        saved = None if self.saver is None or not self.config.saves_state else self.saver.newest_step
        return self.step in (saved, self.resumed.reader.state.step if self.resumed is not None else None)

    def _finish_saving(self) -> None:
        if self.saver is not None:
            self.saver.finish(self._run_state(), self.recorder)

    def _leave(self, ending: Ending) -> int:
        """The last thing that all processes do together."""
        code, line = ending.exit_code(is_saved=self._is_saved), None
        if not ending.is_done:
            left = "the same line goes on from here" if self._is_saved else "nothing is saved"
            line = f"{ending.value}: the run ends after step {self.step}, {left} (exit code {code})"
        self.recorder.event("end", line, step=self.step, reason=ending.value, exit_code=code, is_saved=self._is_saved)
        self.requests.close()
        peers.leave()
        self.agreement.barrier()
        self.recorder.close(waits=ending.is_done)
        return code

    def _introduce(self) -> None:
        shape, facts, parameters = self.shape, self.data.facts, self.plan.parameters
        facts_of_run = {"processes": shape.mesh.world_size, "total_steps": self.total_steps}
        counts = {"parameters": parameters.total, "trained_parameters": parameters.trained}
        self.recorder.event("start", None, run=self.id, version=__version__, **facts_of_run, **counts)
        for line in (self.plan.table, *self.plan.notes, *self.plan.warnings, *filling_lines(self.config, self.epochs)):
            self.recorder.say(line)
        self.recorder.say(
            f"{shape.processes}; a step is {shape.accumulation} micro-batches of"
            f" {self._micro_batch()} in each; {facts.num_rows:,} rows, {self.epochs.counts[0]:,} steps an epoch,"
            f" {self.total_steps:,} steps"
        )
        sets = self.data, self.eval_data.values(), self.cadence, self.epochs
        share = warnings_of_share(*sets, step=self.step, total_steps=self.total_steps)
        for line in (*warnings_of(self.data, *sets[1]), *self.cadence.unwatched(self.step), *share):
            self.recorder.warn(line)
        say_templates(self.config, facts, self.recorder)
        if self.saver is not None and self.saver.saves_alone:
            self.recorder.say("each node has a --checkpoint folder of its own, and keeps its own part there")
        if self.resumed is not None:
            self._introduce_resumed(self.resumed)
        log_dir = self.config.resolved_log_dir
        if self.agreement.place.is_first and log_dir is not None:
            record_options(log_dir, self.config, self.shape, first_step=self.step + 1)

    def _introduce_resumed(self, resumed: Intact) -> None:
        for problem in resumed.damaged:
            self.recorder.warn(f"{problem}; the checkpoint before it is taken")
        folder = resumed.reader.folder
        self.recorder.event("resume", f"going on from {folder} after step {self.step}", checkpoint=str(folder))
        if self.other_length is not None:
            self.recorder.say(self.other_length)
        if self.had_ended:
            how = "stopped early (more --early_stop goes on)" if self.early_stop.stops else "is complete"
            self.recorder.say(f"the run {how}: nothing is left to train")
        if self.fresh_optimizer:
            self.recorder.say("the optimizer's state starts afresh: the checkpoint does not have all of it")

    def _micro_batch(self, length: int | None = None) -> str:
        """The size of a micro-batch, for people."""
        if self.config.batch_size_tokens is not None:
            return f"at most {self.config.batch_size_tokens:,} tokens"
        return f"{self.shape.micro_batch} rows" if length is None else f"{self.shape.micro_batch} x {length} tokens"

    def _exchange(self, steps: Iterator[Step] | None) -> tuple[Step | None, StepFacts]:
        """Read a step, share it, and hear what any process asks for meanwhile."""
        told = self.saver.request() if self.saver is not None else Request.NOTHING
        step, facts = self.agreement.step(steps, self.requests.now() | told, DeviceUse.now())
        self.told, self.stage.documents = facts.request, facts.documents
        self.asked |= facts.request
        return step, facts

    def _train_step(self, steps: Iterator[Step] | ReadAhead | None) -> None:
        """One step.

        Raises:
            StoppedError: on every process: its data cannot be read, or its loss is not finite.
        """
        started = time.perf_counter()
        if self.nan_guard.is_good:
            self.good = self._position()
        number = self.step + 1
        peers.at_step(number)
        step, facts = self._exchange(steps)
        rate = learning_rate(self.config, number, self.total_steps)
        loss, norm, pairs = None, None, {}
        if self.built.checkpointing is not None and self.config.no_checkpoint_grad_step:
            self.built.checkpointing.is_enabled = number <= self.config.no_checkpoint_grad_step
        if number not in self.skipped:
            set_learning_rate(self.engine.optimizer, rate)
            count = self.shape.accumulation
            scale = step_scale(terms=facts.terms, micro_batches=count, data_parallel_size=self.shape.mesh.copies)
            training = self.pairs.objective(step, facts.length, count) if self.pairs else self.training
            self.objective.use(training, scale=scale, gradient=self.engine.gradient_scale)
            if self.built.routers is not None:
                self.built.routers.scale = self.engine.gradient_scale
            try:
                with watched_step(self.engine, self.agreement, self.config, number, self.recorder):
                    loss = self.engine.train_step(step.micro_batches if step is not None else None, facts.length)
            except (torch.OutOfMemoryError, MemoryError) as error:
                error.add_note(f"micro-batches of {self._micro_batch(facts.length)}")
                raise
            norm = self.engine.gradient_norm
            pairs = self.pairs.sums().record() if self.pairs else {}
        self.step += 1
        self.consumed_tokens += facts.tokens
        self.consumed_rows += facts.rows
        self.cursor = Cursor(epoch=facts.epoch, rows=facts.rows_after)
        seconds = time.perf_counter() - started
        record = record_of_step(
            facts,
            step=self.step,
            loss=loss,
            norm=norm,
            rate=rate,
            seconds=seconds,
            rows_of_epoch=self.data.facts.num_rows,
            flops_per_token=self.plan.flops_of(facts),
            world_size=self.shape.mesh.world_size,
        )
        consumed = {"consumed_tokens": self.consumed_tokens, "consumed_rows": self.consumed_rows}
        adapters = record_of_adapters(self.after_step, self.agreement, step=self.step)
        self.recorder.train(record | pairs | self.built.router_record(self.agreement) | adapters | consumed)
        for line in self.pairs.watch.warnings(self.step, pairs) if self.pairs else ():
            self.recorder.warn(line)
        if loss is not None and norm is not None:  # after the record, which is the last one where the guard stops
            # A loss scaler finds its scale by overflowing, so with fp16 the norm may be infinite.
            warning = self.nan_guard.check(self.step, loss, norm if self.config.precision != "fp16" else 0.0)
            spike = self.spike_watch.check(self.step, loss)
            if warning or spike:
                self.recorder.event("bad_step" if warning else "spike", warning or spike, message=warning or spike)

    def _evaluation_of(self, data: Data) -> Evaluation | PairEvaluation | None:
        if self.pairs:
            return self.pairs.evaluate(data, self._exchange)
        return evaluate(self.engine, self.objective, self.agreement, data, self._exchange)

    def _position(self) -> Position:
        return Position(
            step=self.step,
            cursor=self.cursor,
            consumed_tokens=self.consumed_tokens,
            consumed_rows=self.consumed_rows,
            random_states=random_states(),
        )

    def _go_back(self) -> None:
        """To before the steps that left the weights as they were; another try makes them again."""
        self.step, self.cursor = self.good.step, self.good.cursor
        self.consumed_tokens, self.consumed_rows = self.good.consumed_tokens, self.good.consumed_rows
        restore_random_states(self.good.random_states)

    def _evaluate(self) -> bool:
        """Evaluate on every set; whether training should stop early.

        Where the run is asked to end meanwhile, the evaluation is given up, and stays to be made.
        """
        results: list[Evaluation | PairEvaluation] = []
        with self.state.averaged():
            for name, data in self.eval_data.items():
                started = time.perf_counter()
                result = self._evaluation_of(data)
                if result is None:
                    return False
                results.append(result)
                seconds = time.perf_counter() - started
                self.recorder.evaluation({"step": self.step, "name": name, **result.record(), "seconds": seconds})
        self.evaluation_pending = False
        if not results:
            return False
        self.eval_loss = mean_loss(results)
        return self.early_stop.should_stop(self.eval_loss)

    def _save_checkpoint(self) -> None:
        """Begin a checkpoint, unless this very state is saved already."""
        if self.saver is not None and not self._is_saved and self.saver.newest_step != self.step:
            self.saver.save(self._run_state(), self.recorder)
            self.requests.saved()

    def _run_state(self) -> RunState:
        return RunState(
            step=self.step,
            cursor=self.cursor,
            fingerprint=self.data.facts.fingerprint,
            optimizer_steps=self.state.optimizer_steps,
            consumed_tokens=self.consumed_tokens,
            consumed_rows=self.consumed_rows,
            eval_loss=self.eval_loss,
            rebounds=self.early_stop.rebounds,
            config=self.record,
            chat_template=self.data.facts.chat_template,
            evaluation_pending=self.evaluation_pending,
            run=self.id,
        )

    def _resume(self, candidates: list[Path]) -> None:
        """Go on from the first of these checkpoints that is intact."""
        now, forced = self._run_state(), self.config.force_resume

        def check(reader: CheckpointReader) -> None:
            saved = reader.state
            check_same_run(saved, now, forced=forced)
            check_steps_left(self.config, str(reader.folder), step=saved.step, total_steps=self.total_steps)
            check_weights(reader, self.stage, self.agreement)

        self.resumed = first_intact(candidates, self.agreement, check, self.state)
        reader, saved = self.resumed.reader, self.resumed.reader.state
        self.other_length = other_length(saved, now)
        self.fresh_optimizer = optimizer_starts_afresh(reader, self.state, self.agreement, forced=forced)
        self.state.load(reader, saved.optimizer_steps, fresh_optimizer=self.fresh_optimizer)
        self.step, self.cursor = saved.step, saved.cursor
        self.consumed_tokens, self.consumed_rows = saved.consumed_tokens, saved.consumed_rows
        self.eval_loss = self.early_stop.last = saved.eval_loss
        self.early_stop.rebounds = saved.rebounds
        self.evaluation_pending = saved.evaluation_pending
        restore_random_states(reader.rng(self.agreement.place.group("tensor")[0]))  # slices draw the same numbers
