"""Nodes, as on several machines, each with a command line, a model and an environment of its own: through launchers, or
as ranks alone, which start at once."""

import base64
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jllm.parallel.ports import free_port
from tests.distributed.launched import Run, end_group
from tests.forks import context


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How one node ended: its exit code and all its output."""

    code: int
    output: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("error")]


def node_command(number: int, *, port: int, devices: Sequence[int] = (1, 1), address: str = "127.0.0.1") -> list[str]:
    """The launcher's own form for a node of several: it starts `devices[number]` ranks."""
    nodes = {f"node-{each}": list(range(count)) for each, count in enumerate(devices)}
    world = base64.urlsafe_b64encode(json.dumps(nodes).encode()).decode()
    command = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--node_rank={number}"]
    return [*command, f"--master_addr={address}", f"--master_port={port}", "--module", "jllm.train_pipe"]


def run_nodes(
    folder: Path,
    *lines: Sequence[str],
    devices: Mapping[int, Sequence[int]] | None = None,
    environment: Mapping[int, Mapping[str, str]] | None = None,
    timeout: float = 120,
) -> list[Ended]:
    """Run a command line on each node through its launcher, node 0 first, and wait for all.

    Args:
        folder: that all of them start in.
        lines: a node's options.
        devices: what a node believes of the devices of all; one each, where it is not given.
        environment: further variables of a node.
        timeout: after which a node that has not ended is a failure; far less than one waits for others by default.
    """
    port, runs = free_port(), []
    try:
        for number, line in enumerate(lines):
            command = node_command(number, port=port, devices=(devices or {}).get(number, [1] * len(lines)))
            runs.append(Run([*command, *line], folder, environment=(environment or {}).get(number, {})))
        ended = []
        for run in runs:
            output = run.output(timeout)
            ended.append(Ended(code=run.returncode, output=output))
        return ended
    finally:
        for run in runs:
            end_group(run)


def _run_rank(folder: Path, variables: Mapping[str, str], line: Sequence[str], output: Path) -> None:
    """The command as the launcher starts it, but for the interpreter."""
    os.setsid()
    os.chdir(folder)
    os.environ.update(variables)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from jllm.commands.train_pipe import main

    sys.argv = ["train_pipe.py", f"--local_rank={variables['LOCAL_RANK']}", *line]
    main(prog_name="python -m jllm.train_pipe")


def run_ranks(
    folder: Path,
    place: Path,
    *lines: Sequence[str],
    environment: Mapping[int, Mapping[str, str]] | None = None,
    timeout: float = 120,
) -> list[Ended]:
    """Run a command line on each node of one rank, without launchers, and wait for all.

    Args:
        folder: that all of them start in.
        place: a folder for what they say.
        lines: a node's options.
        environment: further variables of a node.
        timeout: after which a node that has not ended is a failure.
    """
    port, ranks = free_port(), []
    for number, line in enumerate(lines):
        variables = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": str(len(lines)), "LOCAL_SIZE": "1"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CROSS_RANK": str(number)}
        variables |= {"CROSS_SIZE": str(len(lines)), **(environment or {}).get(number, {})}
        rank = context.Process(target=_run_rank, args=(folder, variables, line, place / f"said-{number}"))
        rank.start()
        ranks.append(rank)
    ended = []
    try:
        for number, rank in enumerate(ranks):
            rank.join(timeout)
            assert rank.exitcode is not None, (place / f"said-{number}").read_text()
            output = (place / f"said-{number}").read_text()
            ended.append(Ended(code=rank.exitcode, output=output))
    finally:
        for rank in ranks:
            if rank.exitcode is None and rank.pid is not None:
                os.killpg(rank.pid, signal.SIGKILL)
            rank.join()
    return ended
