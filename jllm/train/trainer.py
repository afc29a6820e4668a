"""A training run, top to bottom."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from jllm.errors import UserError
from jllm.models.weights.saving import has_template
from jllm.models.weights.source import ModelInfo
from jllm.train import setup
from jllm.train.checkpoint.export import export
from jllm.train.checkpoint.format import RunState
from jllm.train.checkpoint.reader import CheckpointReader
from jllm.train.checkpoint.resume import (
    Intact,
    check_same_run,
    check_weights,
    find_resume_points,
    first_intact,
    is_exported,
    load_weights_only,
    optimizer_starts_afresh,
    other_length,
    record_of_run,
)
from jllm.train.checkpoint.saver import CheckpointSaver
from jllm.train.checkpoint.state import TrainingState
from jllm.train.clean import remove_earlier_runs
from jllm.train.config import TrainConfig, check_steps_left, skipped_steps
from jllm.train.data.loader import Cursor, ReadAhead, Step, train_steps
from jllm.train.data.open import epoch_steps, open_training_data
from jllm.train.distributed import launch
from jllm.train.distributed.agreement import Agreement, StepFacts
from jllm.train.distributed.deepspeed_engine import build_engine, check_precision
from jllm.train.dry_run import dry_run
from jllm.train.evaluate import Evaluation, evaluate, mean_loss, open_evaluation_sets
from jllm.train.objectives.cross_entropy import CrossEntropy
from jllm.train.objectives.objective import ObjectiveInUse, step_scale
from jllm.train.optim.optimizers import build_optimizer, learning_rate, set_learning_rate, warmup_steps
from jllm.train.records.config_record import record_options
from jllm.train.records.metrics import Recorder
from jllm.train.records.throughput import peak_memory, utilisation
from jllm.train.shape import RunShape, resolve_shape
from jllm.train.triggers import Cadence, EarlyStop, NanGuard, Request, Requests, SpikeWatch

LARGE_EVALUATION_SHARE = 0.15
"""Where evaluations take more of a run's time, the run says so."""


def run(config: TrainConfig) -> None:
    """The work of one process, from joining the others to the exported folder.

    Raises:
        UserError: impossible options, data or model; on every process, or on the one that met it.
    """
    if config.dry_run:
        dry_run(config)
        return
    shape = resolve_shape(config, launch.world_size())
    model_info = setup.read_model_info(config)
    launch.join(config.timeout, deterministic=config.deterministic)
    check_precision(config)
    agreement = Agreement(shape.mesh)
    if config.num_train_epochs == 0:
        convert(config, shape, agreement, model_info)
        return
    TrainingRun(config, shape, agreement, model_info).train()


def convert(config: TrainConfig, shape: RunShape, agreement: Agreement, model_info: ModelInfo) -> None:
    """`--num_train_epochs 0`: the Hugging Face folder of a checkpoint."""
    assert config.output_dir is not None
    assert config.model is not None
    stage = setup.build_stage(config, shape, agreement, ObjectiveInUse(CrossEntropy())).stage
    state = load_weights_only(stage, config, agreement)
    export(
        stage,
        agreement,
        config.output_dir,
        source=config.model,
        dtype=model_info.dtype,
        chat_template=state.chat_template,
    )
    if agreement.place.is_first:
        print(f"wrote {config.output_dir}", flush=True)


class TrainingRun:
    """One run on one process: what it holds between its steps."""

    def __init__(self, config: TrainConfig, shape: RunShape, agreement: Agreement, model_info: ModelInfo) -> None:
        self.config, self.shape, self.agreement, self.model_info = config, shape, agreement, model_info
        if config.clean:
            remove_earlier_runs(config, agreement)
        self.data = open_training_data(config, shape, agreement, model_info)
        self.eval_data = open_evaluation_sets(config, shape, agreement, model_info)
        self.epochs = agreement.from_first_reader(
            lambda: epoch_steps(config, self.data.index, self.data.share, self.data.parts)
        )
        self.total_steps = config.max_steps or self.epochs.total(config.num_train_epochs)
        warmup_steps(config, self.total_steps)
        self.skipped = skipped_steps(config)
        candidates = find_resume_points(config, agreement)
        self._check_model_folders()
        self.training = CrossEntropy()
        self.objective = ObjectiveInUse(self.training)
        self.built = setup.build_stage(
            config, shape, agreement, self.objective, longest_row=self.data.facts.longest_row
        )
        self.stage, self.plan = self.built.stage, self.built.plan
        if config.from_ckpt is not None:
            load_weights_only(self.stage, config, agreement)
        self.engine = build_engine(self.stage, build_optimizer(self.stage.parameters(), config), config, shape)
        self.state = TrainingState(self.engine, self.stage)
        self.step, self.cursor = 0, Cursor()
        self.consumed_tokens = self.consumed_rows = 0
        self.eval_loss: float | None = None
        self.early_stop = EarlyStop(config.early_stop)
        self.record = record_of_run(config, shape, self.total_steps)
        self.fresh_optimizer = False
        self.other_length: str | None = None
        self.resumed: Intact | None = None
        if candidates:
            self._resume(candidates)
        self.had_ended = self.step == self.total_steps
        self.cadence = Cadence(config, epochs=self.epochs, total_steps=self.total_steps)
        self.requests = Requests(config, is_first=agreement.place.is_first, world_size=shape.mesh.world_size)
        self.nan_guard, self.spike_watch = NanGuard(config.on_nan), SpikeWatch()
        self.saver: CheckpointSaver | None = None
        self.saves_alone = False
        if config.checkpoint is not None:
            self.saves_alone = not agreement.sees_one_folder(config.checkpoint)
            ranks = agreement.ranks_of_node() if self.saves_alone else shape.mesh.ranks
            self.saver = CheckpointSaver(config, rank=agreement.rank, ranks=ranks, barrier=agreement.barrier)
        self.recorder = Recorder(
            config.resolved_log_dir,
            enabled=agreement.place.is_first,
            total_steps=self.total_steps,
            first_step=self.step + 1,
            steps_per_print=config.steps_per_print,
        )

    def _check_model_folders(self) -> None:
        """Raises:
        UserError: the stages of a model are on several nodes, and what they write would not come together.
        """
        nodes = self.agreement.gather(self.agreement.node)
        if len({nodes[rank] for rank in self.shape.mesh.writers}) == 1:
            return
        model_only = self.config.checkpoint if self.config.only_ckpt_model else None
        for name, folder in (("--output_dir", self.config.output_dir), ("--checkpoint", model_only)):
            if folder is not None and not self.agreement.sees_one_folder(folder):
                raise UserError(
                    f"{name} {folder} is another folder on each node, and each would get a part of the model; give one"
                    " that all nodes share"
                )

    def train(self) -> None:
        """All steps, with evaluations and checkpoints between them, and the exported folder at the end."""
        self._introduce()
        self.requests.listen()
        if self.step == 0:
            self._evaluate()
        steps = self._read_steps() if not self.had_ended else None
        try:
            while self.step < self.total_steps:
                request = self._train_step(steps)
                stop = bool(request & Request.QUIT)
                if self.cadence.evaluates(self.step) and self._evaluate():
                    self.recorder.say(f"early stop: the evaluation loss rose {self.config.early_stop} times in a row")
                    stop = True
                if stop or request & Request.SAVE or self.cadence.saves(self.step):
                    self._save_checkpoint()
                if stop:
                    break
        finally:
            if isinstance(steps, ReadAhead):
                steps.close()
        if self.saver is not None:
            self.saver.wait()
        if self.config.output_dir is not None and not self.requests.ending:
            self._export(self.config.output_dir)
        self.agreement.barrier()
        self.recorder.close()

    def _export(self, folder: Path) -> None:
        """Write the Hugging Face folder, unless the run had ended, with its export, before it was resumed."""
        if self.had_ended and self.resumed is not None:
            last = self.resumed.reader.folder
            if self.agreement.from_first_reader(lambda: is_exported(folder, last)):
                self.recorder.say(f"{folder} is complete already: nothing is left to do")
                return
        assert self.config.model is not None
        export(
            self.stage,
            self.agreement,
            folder,
            source=self.config.model,
            dtype=self.model_info.dtype,
            chat_template=self.data.facts.chat_template,
        )
        self.recorder.say(f"wrote {folder}")

    def _introduce(self) -> None:
        shape, facts = self.shape, self.data.facts
        self.recorder.say(self.plan.table)
        self.recorder.say(
            f"{shape.processes}; a step is {shape.accumulation} micro-batches of"
            f" {self._micro_batch()} in each; {facts.num_rows:,} rows, {self.epochs.counts[0]:,} steps an epoch,"
            f" {self.total_steps:,} steps"
        )
        exports = self.config.output_dir is not None or self.config.checkpoint is not None
        if facts.templates_differ and exports and self.config.model is not None and not has_template(self.config.model):
            self.recorder.say(
                "warning: the training data were made with different chat templates and the model has none, so its"
                " exports get none; put the right one into the model's folder as chat_template.jinja"
            )
        share = self._evaluation_share()
        if share > LARGE_EVALUATION_SHARE:
            self.recorder.say(
                f"warning: evaluation takes about {share:.0%} of the run; raise --steps_per_eval, or cut --eval_data"
            )
        if self.saves_alone:
            self.recorder.say("each node has a --checkpoint folder of its own, and keeps its own part there")
        if self.resumed is not None:
            for problem in self.resumed.damaged:
                self.recorder.say(f"warning: {problem}; the checkpoint before it is taken")
            self.recorder.say(f"going on from {self.resumed.reader.folder} after step {self.step}")
            if self.other_length is not None:
                self.recorder.say(self.other_length)
            if self.fresh_optimizer:
                self.recorder.say("the optimizer's state starts afresh: the checkpoint does not have all of it")
        log_dir = self.config.resolved_log_dir
        if self.agreement.place.is_first and log_dir is not None:
            record_options(log_dir, self.config, self.shape, first_step=self.step + 1)

    def _micro_batch(self, length: int | None = None) -> str:
        """The size of a micro-batch, for people."""
        if self.config.batch_size_tokens is not None:
            return f"at most {self.config.batch_size_tokens:,} tokens"
        return f"{self.shape.micro_batch} rows" if length is None else f"{self.shape.micro_batch} x {length} tokens"

    def _evaluation_share(self) -> float:
        """About how much of the run's time evaluations take: a forward pass is a third of a training step."""
        first = self.step + 1
        times = (first == 1) + sum(self.cadence.evaluates(step) for step in range(first, self.total_steps + 1))
        sets = [self.data, *self.eval_data.values()]
        known = all(data.facts.tokens for data in sets)
        train, *evals = ((data.facts.tokens if known else data.facts.num_rows) or 0 for data in sets)
        training = train * (self.total_steps - self.step) / self.epochs.counts[0]
        evaluation = times * sum(evals) / 3
        return evaluation / max(evaluation + training, 1)

    def _read_steps(self) -> Iterator[Step] | ReadAhead | None:
        """This pipeline's steps from the cursor on; None where the process does not read."""
        if self.data.index is None:
            return None
        ahead = self.config.num_workers > 0
        steps = train_steps(
            self.data.index,
            self.data.share,
            seed=self.config.seed,
            shuffle=not self.config.no_shuf,
            cursor=self.cursor,
            ahead=ahead,
            parts=self.data.parts,
        )
        return ReadAhead(steps) if ahead else steps

    def _train_step(self, steps: Iterator[Step] | ReadAhead | None) -> Request:
        """One step; what any process asked for meanwhile."""
        started = time.perf_counter()
        step, facts = self.agreement.step(steps, self.requests.now(), peak_memory())
        number = self.step + 1
        rate = learning_rate(self.config, number, self.total_steps)
        loss, norm = None, None
        if self.built.checkpointing is not None and self.config.no_checkpoint_grad_step:
            self.built.checkpointing.is_enabled = number <= self.config.no_checkpoint_grad_step
        if number not in self.skipped:
            set_learning_rate(self.engine.optimizer, rate)
            scale = step_scale(
                trained_tokens=facts.trained_tokens,
                micro_batches=self.shape.accumulation,
                data_parallel_size=self.shape.mesh.data,
            )
            self.objective.use(self.training, scale=scale)
            if self.built.routers is not None:
                self.built.routers.scale = self.engine.gradient_scale
            try:
                loss = self.engine.train_step(step.micro_batches if step is not None else None, facts.length)
            except (torch.OutOfMemoryError, MemoryError) as error:
                error.add_note(f"micro-batches of {self._micro_batch(facts.length)}")
                raise
            norm = self.engine.gradient_norm
        self._advance(facts)
        seconds = time.perf_counter() - started
        speed = facts.tokens / seconds
        self.recorder.train(
            {
                "step": self.step,
                "epoch": facts.epoch + facts.rows_after / self.data.facts.num_rows,
                "loss": loss,
                "lr": rate,
                "grad_norm": norm,
                "tokens": facts.tokens,
                "trained_tokens": facts.trained_tokens,
                "tokens_per_second": speed,
                "mfu": utilisation(speed, self.plan.flops_per_token, self.shape.mesh.world_size),
                **self._router_record(),
                "data_wait": facts.waited / seconds,
                "seconds": seconds,
                "memory_mib": list(facts.memory),
                "consumed_tokens": self.consumed_tokens,
                "consumed_rows": self.consumed_rows,
            }
        )
        if loss is not None and norm is not None:  # after the record, which is the last one where the guard stops
            # A loss scaler finds its scale by overflowing, so with fp16 the norm may be infinite.
            warning = self.nan_guard.check(self.step, loss, norm if self.config.precision != "fp16" else 0.0)
            spike = self.spike_watch.check(self.step, loss)
            if warning or spike:
                self.recorder.say(warning or spike or "")
        return facts.request

    def _router_record(self) -> dict[str, Any]:
        """Balance loss and expert loads of a mixture of experts, over all stages and pipelines."""
        if self.built.routers is None:
            return {}
        reports = self.agreement.gather(self.built.routers.take())
        load: dict[str, list[float]] = {}
        for rank in self.shape.mesh.writers:
            load |= reports[rank].load
        aux_loss = sum(report.loss for report in reports) / self.shape.mesh.data
        return {"aux_loss": aux_loss, "max_expert_load": max(max(shares) for shares in load.values()) if load else None}

    def _advance(self, facts: StepFacts) -> None:
        self.step += 1
        self.consumed_tokens += facts.tokens
        self.consumed_rows += facts.rows
        self.cursor = Cursor(epoch=facts.epoch, rows=facts.rows_after)

    def _evaluate(self) -> bool:
        """Evaluate on every set; whether training should stop early."""
        results: dict[str, Evaluation] = {}
        for name, data in self.eval_data.items():
            started = time.perf_counter()
            results[name] = result = evaluate(self.engine, self.objective, self.agreement, data)
            self.recorder.evaluation(
                {
                    "step": self.step,
                    "name": name,
                    "eval_loss": result.loss,
                    "eval_tokens": result.tokens,
                    "perplexity": result.perplexity,
                    "accuracy": result.accuracy,
                    "seconds": time.perf_counter() - started,
                }
            )
        if not results:
            return False
        self.eval_loss = mean_loss(results.values())
        return self.early_stop.should_stop(self.eval_loss)

    def _save_checkpoint(self) -> None:
        if self.saver is None:
            return
        started = time.perf_counter()
        if self.config.only_ckpt_model:
            folder = self.saver.save_model(
                self.stage,
                self.step,
                self.eval_loss,
                dtype=self.model_info.dtype,
                writers=self.shape.mesh.writers,
                chat_template=self.data.facts.chat_template,
            )
        else:
            folder = self.saver.save(self.state.pieces(alone=self.saves_alone), rng_states(), self._run_state())
        self.requests.saved()
        self.recorder.say(f"checkpoint {folder} after {time.perf_counter() - started:.2f} s of waiting")

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
        restore_rng(reader.rng(self.agreement.rank))


def rng_states() -> dict[str, torch.Tensor]:
    """The states of this process's random-number generators."""
    states = {"cpu": torch.get_rng_state()}
    if get_accelerator().device_name() != "cpu":
        states["device"] = get_accelerator().get_rng_state()
    return states


def restore_rng(states: dict[str, torch.Tensor]) -> None:
    """The inverse of `rng_states`."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "device" in states and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(states["device"])
