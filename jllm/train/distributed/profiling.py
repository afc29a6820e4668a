"""`--profile_step`: what the devices of the first pipeline ran during one step, as text beside the records.

On CUDA these are the kernels, elsewhere the operators of PyTorch on the host. Cost: the profiler's own in that step,
which is slower for it; nothing in others.
"""

import contextlib
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from jllm import atomic
from jllm.parallel.collectives import Collectives
from jllm.train.config import TrainConfig
from jllm.train.distributed.deepspeed_engine import TrainingEngine
from jllm.train.distributed.tracing import traced_step
from jllm.train.records.kernels import PROFILE_NAME, Kernel, report
from jllm.train.records.metrics import Recorder

_SILENT = "99"
_OF_A_WAIT = "called a synchronizing CUDA operation"
"""In PyTorch's warning of it."""


@contextlib.contextmanager
def watched_step(
    engine: TrainingEngine, collectives: Collectives, config: TrainConfig, step: int, recorder: Recorder
) -> Iterator[None]:
    """Trace and profile what is done meanwhile, where the options ask for it of this step.

    Every process calls it. A disk that is full then is a warning.
    """
    with traced_step(engine, collectives, config, step, recorder), _profiled(collectives, config, step, recorder):
        yield


@contextlib.contextmanager
def _profiled(collectives: Collectives, config: TrainConfig, step: int, recorder: Recorder) -> Iterator[None]:
    folder, place = config.resolved_log_dir, collectives.place
    if step != config.profile_step or folder is None or place.data:
        yield
        return
    is_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    # PyTorch's profiler writes lines of its own to the console, and reads this when it first starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", _SILENT)
    activity = ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU
    with _host_waits(is_cuda) as host_waits, profile(activities=[activity]) as watched:
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
    kind = DeviceType.CUDA if is_cuda else DeviceType.CPU
    kernels = [
        Kernel(name=event.name, start=event.time_range.start / 1000, end=event.time_range.end / 1000)
        for event in watched.events()
        if event.device_type == kind and event.cpu_parent is None
    ]
    title = f"step {step}, stage {place.pipe}"
    title += f", slice {place.tensor}" * (place.mesh.tensor > 1) + f", run {place.sequence}" * (place.mesh.sequence > 1)
    text = report(kernels, title=title, seconds=seconds, host_waits=host_waits)
    path = folder / PROFILE_NAME.format(step=step, rank=place.rank)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, text)
    except OSError as error:
        recorder.warn(f"the profile of step {step} could not be written: {error.strerror}")
    else:
        recorder.event("profile", f"wrote {path}", step=step, file=str(path))


@contextlib.contextmanager
def _host_waits(is_cuda: bool) -> Iterator[Counter[str]]:
    """How often the host waits for the device meanwhile, by file and line; what PyTorch tells of."""
    found: Counter[str] = Counter()
    if not is_cuda:
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def count(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if _OF_A_WAIT in str(message):
                found[f"{'/'.join(Path(filename).parts[-3:])}:{lineno}"] += 1
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = count
        warnings.filterwarnings("always", message=f".*{_OF_A_WAIT}")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
