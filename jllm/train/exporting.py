"""The Hugging Face folder that a run leaves: at its end, of its last or its best weights, or out of a checkpoint."""

from pathlib import Path

from jllm.errors import UserError, say
from jllm.models.pipeline.stage import PipelineStage
from jllm.models.weights.saving import ExportedFolder, ModelFolder, has_template
from jllm.models.weights.source import ModelInfo
from jllm.parallel import peers
from jllm.train import setup
from jllm.train.adapters import Adapters
from jllm.train.checkpoint.export import export
from jllm.train.checkpoint.reader import CheckpointReader
from jllm.train.checkpoint.resume import is_exported, load_weights, load_weights_only
from jllm.train.checkpoint.run_saver import RunSaver
from jllm.train.config import TrainConfig
from jllm.train.data.open import DataFacts
from jllm.train.distributed.agreement import Agreement
from jllm.train.objectives.cross_entropy import CrossEntropy
from jllm.train.objectives.objective import ObjectiveInUse
from jllm.train.records.metrics import Recorder
from jllm.train.shape import RunShape


def convert(config: TrainConfig, shape: RunShape, agreement: Agreement, model: ModelInfo) -> None:
    """`--num_train_epochs 0`: the Hugging Face folder of a checkpoint."""
    assert config.output_dir is not None
    assert config.model is not None
    built = setup.build_stage(config, shape, agreement, ObjectiveInUse(CrossEntropy()))
    template = load_weights_only(built.stage, config, agreement).chat_template
    export(
        built.stage,
        agreement,
        config.output_dir,
        exported_folder(config, model, built.adapters),
        chat_template=template,
    )
    if agreement.place.is_first:
        say(f"wrote {config.output_dir}", flush=True)
    peers.leave()
    agreement.barrier()


def exported_folder(config: TrainConfig, model: ModelInfo, adapters: Adapters | None) -> ExportedFolder:
    """What the run leaves: the model, or its adapters."""
    assert config.model is not None
    return ModelFolder(source=config.model, dtype=model.dtype) if adapters is None else adapters.folder


def say_templates(config: TrainConfig, facts: DataFacts, recorder: Recorder) -> None:
    """Warn where an export of this run gets no chat template, because its data have several."""
    exports = config.output_dir is not None or config.checkpoint is not None
    if facts.templates_differ and exports and config.model is not None and not has_template(config.model):
        recorder.say(
            "warning: the training data were made with different chat templates and the model has none, so its exports"
            " get none; put the right one into the model's folder as chat_template.jinja"
        )


def export_run(
    config: TrainConfig,
    agreement: Agreement,
    stage: PipelineStage,
    saver: RunSaver | None,
    recorder: Recorder,
    kind: ExportedFolder,
    *,
    chat_template: str | None,
    step: int,
    had_ended_at: Path | None,
) -> None:
    """Write `--output_dir`, with the weights that `--export` names; nothing is trained after that.

    Args:
        config: the options.
        agreement: the processes.
        stage: with the last weights.
        saver: of the run's checkpoints.
        recorder: is told what is written.
        kind: of folder.
        chat_template: of the data.
        step: the last one.
        had_ended_at: the checkpoint that a run that had ended was resumed from; its export may be there already.

    Raises:
        UserError: on every process: there is no checkpoint to take the best weights from.
    """
    folder = config.output_dir
    assert folder is not None
    if had_ended_at is not None and agreement.from_first_reader(lambda: is_exported(folder, had_ended_at, kind)):
        recorder.say(f"{folder} is complete already: nothing is left to do")
        return
    if config.export == "best":
        assert saver is not None
        _load_best(stage, saver, agreement, recorder, step=step)
    export(stage, agreement, folder, kind, chat_template=chat_template)
    recorder.event("export", f"wrote {folder}", step=step, folder=str(folder))
    recorder.artefact("model", folder, step=step)


def _load_best(stage: PipelineStage, saver: RunSaver, agreement: Agreement, recorder: Recorder, *, step: int) -> None:
    name = agreement.from_first_reader(lambda: getattr(saver.best(), "name", None))
    if name is None:
        raise UserError(f"--export best: {saver.root} holds no complete checkpoint; give --export last")
    best = CheckpointReader(saver.root / name)
    recorder.say(f"exporting {name}, the best evaluated checkpoint: loss {best.state.eval_loss}")
    if best.state.step != step:
        load_weights(stage, best, agreement)
