"""The services that `--report_to` names, for a run. Their packages are imported by the thread that reports."""

from collections.abc import Callable

from jllm.train.config import TrainConfig, resolved_options
from jllm.train.records.sinks.mlflow import Mlflow
from jllm.train.records.sinks.names import services_of
from jllm.train.records.sinks.reported_run import ReportedRun
from jllm.train.records.sinks.reporter import Reporter, Service
from jllm.train.records.sinks.trackio import Trackio
from jllm.train.records.sinks.wandb import Wandb

_SERVICES: dict[str, Callable[[ReportedRun], Service]] = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


def reporters_of(config: TrainConfig, run: str) -> list[Reporter]:
    """One for each service.

    Args:
        config: the options.
        run: the run's id.
    """
    reported = ReportedRun(
        id=run,
        options=resolved_options(config),
        folder=config.resolved_log_dir,
        with_files=config.report_files,
    )
    return [Reporter(_SERVICES[name](reported)) for name in services_of(config.report_to)]
