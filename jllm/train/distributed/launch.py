"""The processes of a run: joining them, telling them apart, and ending them all when one fails.

The `deepspeed` launcher ends every rank of a node as soon as one rank ends with a non-zero code, so a rank that fails
must end at once, whatever its peers are waiting in: `run_rank` reports the failure and leaves without tearing down the
process groups. It also ends the rank when the launcher is gone, so that nothing outlives a launcher that was killed,
unless the rank was sent SIGTERM too: then every process of the job was asked to end, and the ranks save before.
"""

import contextlib
import datetime
import io
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from jllm.errors import UserError, of_file_system, report, say
from jllm.parallel import meeting, peers
from jllm.parallel.ports import free_port
from jllm.train.distributed import operators
from jllm.train.distributed.start import LAUNCHER, tell_mistake

LAUNCHER_POLL_SECONDS = 1.0
SIGTERM_SECONDS = 5.0
"""How long a process that was asked to end waits for all others to be asked too."""
LOST_RANK_SECONDS = 8.0
PEERS_FIRST_SECONDS = 30
"""Collective operations wait longer than that, so that who stands still is named before they give up."""
SIGNS_OF_A_LOST_RANK = (
    "Connection reset by peer",
    "Connection closed by peer",
    "Broken pipe",
    "remote process exited",  # NCCL
    "Connection refused",
    "Timed out waiting",  # gloo
)
"""What gloo and NCCL say of a connection whose other end is gone."""


def rank() -> int:
    """This process's number in the run, from the launcher's environment; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process speaks for the whole run."""
    return rank() == 0


def world_size() -> int:
    """The number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's set-up messages, which it prints, off standard output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def join(
    timeout_seconds: int,
    *,
    deterministic: bool = False,
    facts: Callable[[], meeting.Facts] = dict,
    join_timeout: float = 600,
) -> None:
    """Join the run's process group; a single process without a launcher is a run of one.

    Before that all processes meet, which takes at most `join_timeout` seconds, and compare their `facts`.

    With `deterministic`, kernels whose results vary from run to run are not used. On CPU none of ours vary.

    Raises:
        UserError: DeepSpeed compiles a small operator for CPU runs, and there is no compiler; the processes differ, one
            of them refuses to start, or some do not come.
    """
    _set_alone_environment()
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger as deepspeed_logger
    from torch.distributed import DistNetworkError, distributed_c10d

    deepspeed_logger.setLevel("WARNING")
    # DeepSpeed broadcasts parameters where PyTorch would like to be told that no gradient is meant.
    warnings.filterwarnings("ignore", message=".*c10d::.*autograd kernel.*")
    if deterministic:
        import torch

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts, which is later
        torch.use_deterministic_algorithms(True)
        # Filling memory that is about to be written costs time and changes no result.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if get_accelerator().device_name() == "cpu":
        _share_cores()
        operators.compile_for_cpu()
    _meet(facts, timeout_seconds, join_timeout)
    timeout = datetime.timedelta(seconds=timeout_seconds + PEERS_FIRST_SECONDS)
    try:
        with quiet():
            deepspeed.init_distributed(get_accelerator().communication_backend_name(), timeout=timeout)
    except DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"{where} is taken, probably by another run; give the launcher another port: deepspeed --master_port N"
            ) from None
        raise UserError(f"cannot reach the other processes at {where}: {error}") from None
    # Further groups, which DeepSpeed makes too, do not have the first one's: with NCCL they give up after 10 minutes.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, name, max(timeout, getattr(distributed_c10d, name) or timeout))
    if get_accelerator().device_name() == "cpu":
        _forget_buffer_name()


def _meet(facts: Callable[[], meeting.Facts], timeout_seconds: int, join_timeout: float) -> None:
    """Meet all others, and watch each other from then on."""
    if world_size() == 1:
        return
    met = meeting.attend(
        rank=rank(),
        world_size=world_size(),
        timeout=join_timeout,
        facts=facts(),
        offer=lambda: peers.open_desk(timeout_seconds),
    )
    peers.join(rank=rank(), world_size=world_size(), timeout=timeout_seconds, desk=met.offer, hosts=met.hosts)


def _set_alone_environment() -> None:
    if "RANK" in os.environ:
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


def _share_cores() -> None:
    """Divide the node's cores among its ranks, unless the user did: more threads than cores slow each other down."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    import torch

    ranks = int(os.environ.get("LOCAL_SIZE") or world_size())
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def _forget_buffer_name() -> None:
    """Remove the name of the shared memory (66 MiB a rank) that DeepSpeed's CPU backend has made.

    It would stay for ever where a process is killed or leaves at once. Everyone has opened it by now, so the memory
    itself ends with the last process of the run.
    """
    import torch.distributed as dist

    dist.barrier()
    where = f"{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{rank()}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{where}").unlink(missing_ok=True)


def run_rank(function: Callable[[], int]) -> None:
    """Run one rank's work, which gives the exit code; does not return.

    A `UserError` is one line, printed once, and its own exit code. So is what the file system of one rank refuses, and
    a lack of device memory, with the options that help: the others are told before this one ends, and say nothing.
    Any other exception is printed with the rank's number and its traceback, and exit code 1. A
    rank that fails because another one is gone leaves the first word to that one, and says so in a line.
    """
    _watch_launcher()
    code = 0
    try:
        code = function()
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        _end_at_once_on_sigterm()
        code = 1
        if (mistake := _mistake_of(error)) is not None:
            if (speaks := peers.may_speak()) is None:
                tell_mistake(str(mistake), report)
            else:
                report(str(mistake), speaks=speaks)
            code = mistake.exit_code
        elif any(sign in str(error) for sign in SIGNS_OF_A_LOST_RANK):
            time.sleep(LOST_RANK_SECONDS)  # the launcher, which ends the others when one has failed, is quicker
            say(f"rank {rank()} ends: another rank is gone", file=sys.stderr)
        else:
            say(f"rank {rank()} failed: {type(error).__name__}: {error}", file=sys.stderr)
            say(traceback.format_exc(), end="", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: process groups and their threads may wait for peers that will never answer.
    os._exit(code)


def _mistake_of(error: BaseException) -> UserError | None:
    """What a user can put right, in a line, which has the rank's number where one rank alone may have met it."""
    if isinstance(error, UserError):
        return error
    if _is_out_of_memory(error):
        return UserError(f"rank {rank()} is out of memory: {out_of_memory_advice(error)}")
    refused = of_file_system(error) if isinstance(error, OSError) else None
    return None if refused is None else UserError(f"rank {rank()}: {refused}")


def _end_at_once_on_sigterm() -> None:
    """The launcher ends the ranks that are left; a run that has failed has nothing to save then."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def out_of_memory_advice(error: BaseException) -> str:
    """One line: what was in flight (a note that the step loop adds to the error), and the options that need less."""
    reason = str(error).strip().splitlines()
    shape = "; ".join(getattr(error, "__notes__", []))
    return (
        f"{shape + ': ' if shape else ''}{reason[0][:160] if reason else 'no reason given'}; give"
        " --checkpoint_grad_interval 1, a smaller --per_device_train_batch_size (or --batch_size_tokens) or --seq_len,"
        " more --pipe_parallel_size, or --partition_method mem"
    )


def _parent_of(process: int) -> int | None:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1])


asked_to_end = threading.Event()
"""Set by whoever takes SIGTERM to save: the rank then ends by itself, launcher or not."""


def _watch_launcher() -> None:
    """End this rank when the launcher that started it, or the command that started the launcher, is gone.

    Both die at once of the SIGTERM that every process of a job gets, maybe before this rank has seen its own.
    """
    launcher = os.getppid()
    try:
        command = Path(f"/proc/{launcher}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return
    if LAUNCHER not in command:
        return
    starter = _parent_of(launcher)

    def watch() -> None:
        while os.getppid() == launcher and _parent_of(launcher) == starter:
            time.sleep(LAUNCHER_POLL_SECONDS)
        if not asked_to_end.wait(SIGTERM_SECONDS):
            if is_first():
                peers.end_lost("the launcher, or what started it, is gone: the run ends")
            os._exit(130)

    threading.Thread(target=watch, name="watch-launcher", daemon=True).start()
