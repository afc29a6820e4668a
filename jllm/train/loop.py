"""A training run, top to bottom."""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from jllm import atomic
from jllm.errors import UserError
from jllm.models.source import ModelInfo
from jllm.train import checkpoint, processes, setup
from jllm.train.agreement import Agreement, StepFacts
from jllm.train.config import Layout, TrainConfig, resolve_layout, skipped_steps
from jllm.train.engine import Engine, build_engine
from jllm.train.evaluate import evaluate
from jllm.train.export import export
from jllm.train.loss import TokenLoss
from jllm.train.metrics import Recorder
from jllm.train.optim import build_optimizer, learning_rate, set_learning_rate, warmup_steps
from jllm.train.resume import Resumed, check_same_run, find_resume_point, load_weights_only
from jllm.train.state import TrainingState
from jllm.train.stream import Cursor, ReadAhead, Step, train_steps


def run(config: TrainConfig) -> None:
    """The work of one process, from joining the others to the exported folder.

    Raises:
        UserError: impossible options, data or model; on every process, or on the one that met it.
    """
    layout = resolve_layout(config, processes.world_size())
    model_info = setup.read_model_info(config)
    processes.join(config.timeout)
    agreement = Agreement(layout)
    if config.num_train_epochs == 0:
        convert(config, layout, agreement, model_info)
        return
    Run(config, layout, agreement, model_info).train()


def convert(config: TrainConfig, layout: Layout, agreement: Agreement, model_info: ModelInfo) -> None:
    """`--num_train_epochs 0`: the Hugging Face folder of a checkpoint."""
    assert config.output_dir is not None
    assert config.model is not None
    stage, _ = setup.build_stage(config, layout, agreement, TokenLoss())
    load_weights_only(stage, config)
    export(stage, agreement, config.output_dir, source=config.model, dtype=model_info.dtype)
    if agreement.rank == 0:
        print(f"wrote {config.output_dir}", flush=True)


class Run:
    """One run on one process: what it holds between its steps."""

    def __init__(self, config: TrainConfig, layout: Layout, agreement: Agreement, model_info: ModelInfo) -> None:
        assert config.train_data is not None
        self.config, self.layout, self.agreement, self.model_info = config, layout, agreement, model_info
        self.data = setup.open_data(config.train_data, config, layout, agreement, model_info)
        self.eval_data = (
            setup.open_data(config.eval_data, config, layout, agreement, model_info) if config.eval_data else None
        )
        self.steps_per_epoch = -(-self.data.facts.num_rows // layout.global_batch)
        self.total_steps = config.max_steps or config.num_train_epochs * self.steps_per_epoch
        warmup_steps(config, self.total_steps)
        self.skipped = skipped_steps(config)
        self.resumed = agreement.from_first_reader(lambda: find_resume_point(config))
        self.loss = TokenLoss()
        self.stage, self.table = setup.build_stage(config, layout, agreement, self.loss)
        if config.from_ckpt is not None:
            load_weights_only(self.stage, config)
        self.engine: Engine = build_engine(self.stage, build_optimizer(self.stage.parameters(), config), config, layout)
        self.state = TrainingState(self.engine, self.stage)
        self.step, self.cursor = 0, Cursor()
        self.consumed_tokens = self.consumed_rows = 0
        if self.resumed is not None:
            self._resume(self.resumed)
        self.recorder = Recorder(
            config.resolved_log_dir,
            enabled=agreement.rank == 0,
            total_steps=self.total_steps,
            first_step=self.step + 1,
            steps_per_print=config.steps_per_print,
        )

    def train(self) -> None:
        """All steps, with evaluations and checkpoints between them, and the exported folder at the end."""
        self._introduce()
        if self.step == 0:
            self._evaluate()
        steps = self._read_steps()
        try:
            while self.step < self.total_steps:
                self._train_step(steps)
                at_end = self.step == self.total_steps
                epoch_ended = self.cursor.rows >= self.data.facts.num_rows
                if at_end or _is_due(self.step, self.config.steps_per_eval, epoch_ended):
                    self._evaluate()
                if at_end or _is_due(self.step, self.config.steps_per_checkpoint, epoch_ended):
                    self._save_checkpoint()
        finally:
            if isinstance(steps, ReadAhead):
                steps.close()
        if self.config.output_dir is not None:
            assert self.config.model is not None
            dtype = self.model_info.dtype
            export(self.stage, self.agreement, self.config.output_dir, source=self.config.model, dtype=dtype)
            self.recorder.say(f"wrote {self.config.output_dir}")
        self.recorder.close()

    def _introduce(self) -> None:
        layout, facts = self.layout, self.data.facts
        self.recorder.say(self.table)
        self.recorder.say(
            f"{layout.pipe} stages x {layout.data} pipelines; a step is {layout.accumulation} micro-batches of"
            f" {layout.micro_batch} rows in each, {layout.global_batch} rows in all; {facts.num_rows:,} rows,"
            f" {self.steps_per_epoch:,} steps an epoch, {self.total_steps:,} steps"
        )
        if self.resumed is not None:
            self.recorder.say(f"going on from {self.resumed.folder} after step {self.step}")
        log_dir = self.config.resolved_log_dir
        if self.agreement.rank == 0 and log_dir is not None:
            atomic.write_json(log_dir / "config.json", resolved_options(self.config))

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
        )
        return ReadAhead(steps) if ahead else steps

    def _train_step(self, steps: Iterator[Step] | ReadAhead | None) -> None:
        started = time.perf_counter()
        step = next(steps) if steps is not None else None
        waited = time.perf_counter() - started
        facts = self.agreement.step(step)
        number = self.step + 1
        rate = learning_rate(self.config, number, self.total_steps)
        loss, norm = float("nan"), 0.0
        if number not in self.skipped:
            set_learning_rate(self.engine.optimizer, rate)
            self.loss.set_step(
                trained_tokens=facts.trained_tokens,
                micro_batches=self.layout.accumulation,
                data_parallel_size=self.layout.data,
            )
            loss = self.engine.train_step(step.micro_batches if step is not None else None, facts.length)
            norm = self.engine.gradient_norm
        self._advance(facts)
        seconds = time.perf_counter() - started
        self.recorder.train(
            {
                "step": self.step,
                "epoch": facts.epoch + facts.rows_after / self.data.facts.num_rows,
                "loss": loss,
                "lr": rate,
                "grad_norm": norm,
                "tokens": facts.tokens,
                "trained_tokens": facts.trained_tokens,
                "tokens_per_second": facts.tokens / seconds,
                "data_wait": waited / seconds,
                "seconds": seconds,
                "consumed_tokens": self.consumed_tokens,
                "consumed_rows": self.consumed_rows,
            }
        )

    def _advance(self, facts: StepFacts) -> None:
        self.step += 1
        self.consumed_tokens += facts.tokens
        self.consumed_rows += facts.rows
        self.cursor = Cursor(epoch=facts.epoch, rows=facts.rows_after)

    def _evaluate(self) -> None:
        if self.eval_data is None:
            return
        started = time.perf_counter()
        result = evaluate(
            self.engine,
            self.loss,
            self.agreement,
            self.layout,
            index=self.eval_data.index,
            share=self.eval_data.share,
            num_rows=self.eval_data.facts.num_rows,
        )
        self.recorder.evaluation(
            {
                "step": self.step,
                "eval_loss": result.loss,
                "eval_tokens": result.tokens,
                "perplexity": result.perplexity,
                "seconds": time.perf_counter() - started,
            }
        )

    def _save_checkpoint(self) -> None:
        root = self.config.checkpoint
        if root is None:
            return
        folder = checkpoint.folder_of_step(root, self.step)
        if self.agreement.rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            checkpoint.remove_incomplete(root)
        self.agreement.barrier()
        checkpoint.write_part(folder, self.agreement.rank, self.state.pieces(), rng_states())
        self.agreement.barrier()
        if self.agreement.rank == 0:
            checkpoint.commit(folder, self._run_state(), self.layout.world_size)
            checkpoint.keep_newest(root, self.config.max_num_checkpoints)
            self.recorder.say(f"wrote {folder}")
        self.agreement.barrier()

    def _run_state(self) -> checkpoint.RunState:
        return checkpoint.RunState(
            step=self.step,
            cursor=self.cursor,
            fingerprint=self.data.facts.fingerprint,
            optimizer_steps=self.state.optimizer_steps,
            consumed_tokens=self.consumed_tokens,
            consumed_rows=self.consumed_rows,
            config={**resolved_options(self.config), "global_batch": self.layout.global_batch},
        )

    def _resume(self, resumed: Resumed) -> None:
        reader = checkpoint.CheckpointReader(Path(resumed.folder))
        saved = reader.state
        check_same_run(saved, self._run_state(), forced=self.config.force_resume)
        if saved.step >= self.total_steps:
            raise UserError(
                f"{resumed.folder} is after step {saved.step} of {self.total_steps}: nothing is left to train;"
                " raise --max_steps or --num_train_epochs"
            )
        self.state.load_weights(reader.read)
        refresh = getattr(self.engine.optimizer, "update_lp_params", None)
        if refresh is not None:
            refresh()
        self.state.load_optimizer(reader.read, saved.optimizer_steps)
        self.step, self.cursor = saved.step, saved.cursor
        self.consumed_tokens, self.consumed_rows = saved.consumed_tokens, saved.consumed_rows
        restore_rng(reader.rng(self.agreement.rank))


def _is_due(step: int, every: int, epoch_ended: bool) -> bool:
    return step % every == 0 if every > 0 else epoch_ended


def resolved_options(config: TrainConfig) -> dict[str, Any]:
    """The options as JSON values."""
    values = dataclasses.asdict(config)
    values.pop("local_rank")
    return json.loads(json.dumps(values, default=str))  # type: ignore[no-any-return]


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
