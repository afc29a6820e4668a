"""The processes of a run on this machine, started without typing DeepSpeed's launcher.

`jllm train --pipe_parallel_size 4 ...` starts four processes through that launcher, quietly: the launcher then says
nothing of its own, so the last thing on the screen is what the run said last. SIGINT and SIGTERM
go to the run's processes and pass the launcher by, which would end with an exit code of its own: that of the command is
always the run's.

Cost: nothing but the launcher's own start; nothing heavy is imported here.
"""

import base64
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from jllm import children
from jllm.errors import UserError
from jllm.options import as_arguments
from jllm.parallel import meeting
from jllm.parallel.ports import free_port
from jllm.train.config import TrainConfig

LAUNCHER = "deepspeed.launcher.launch"
LAST_ORDINARY_CODE = 190
NVIDIA_DRIVER = Path("/proc/driver/nvidia")


def starts_processes(config: TrainConfig) -> bool:
    """Whether this process is to start those of the run: no launcher did, and they are more than one."""
    return "RANK" not in os.environ and not config.dry_run and config.wanted_processes > 1


def start_processes(config: TrainConfig) -> int:
    """Run them to their end; the exit code.

    Raises:
        UserError: there are fewer devices than processes.
    """
    world = json.dumps({"localhost": _devices(config.wanted_processes)})
    command = [
        *children.python("-u", "-m", LAUNCHER),
        f"--world_info={base64.urlsafe_b64encode(world.encode()).decode()}",
        *("--master_addr=127.0.0.1", f"--master_port={free_port()}", "--log_level=critical"),
        *("--module", "jllm.train_pipe", *as_arguments(config)),
    ]
    launcher = subprocess.Popen(command, env=children.environment(), process_group=0)

    def hand_on(number: int, frame: FrameType | None) -> None:
        if launcher.poll() is None:
            for process in _children(launcher.pid) or [launcher.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = launcher.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code < 0:
        return 128 - code
    # The launcher ends with the negative number of a signal that ended a process, of which a byte is left.
    return 128 + 256 - code if code > LAST_ORDINARY_CODE else code


def tell_mistake(message: str, speak: Callable[..., None]) -> None:
    """Say a mistake that this process met before it joined the others, once on each node, and tell the other nodes.

    Args:
        message: the line.
        speak: prints it, as `errors.report` does.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0" or not meeting.has_several_nodes():
        speak(message)
        meeting.refuse(message)
    elif not meeting.refuse(message):
        speak(message)


def _children(process: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def _devices(count: int) -> list[int | str]:
    """The devices that the launcher gives to the processes, one each: the first of those that this process may see."""
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if not named or not NVIDIA_DRIVER.exists():
        return list(range(count))
    if len(named) < count:
        raise UserError(
            f"{count} processes, and CUDA_VISIBLE_DEVICES names {len(named)} devices; give --processes {len(named)}, or"
            " more devices"
        )
    return [*named[:count]]
