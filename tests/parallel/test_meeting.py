"""Processes that meet: one line where they differ or one refuses, and who does not come is named."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jllm.parallel.meeting import differences
from jllm.parallel.ports import free_port

PROGRAM = """
import json, os, sys
rank, world, port, timeout, facts = sys.argv[1:]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, WORLD_SIZE=world)
from jllm.errors import UserError
from jllm.parallel import meeting
meeting.SAY_SECONDS = 1.0
try:
    if facts.startswith("refuses"):
        meeting.refuse(facts)
        sys.exit(2)
    met = meeting.attend(
        rank=int(rank),
        world_size=int(world),
        timeout=float(timeout),
        facts=json.loads(facts),
        offer=lambda: ["desk", rank],
    )
    # In one piece: processes of a launcher have one pipe.
    os.write(1, f"told {met.offer} {len(set(met.hosts))} {len(met.hosts)}\\n".encode())
    meeting.attend(rank=int(rank), world_size=int(world), timeout=float(timeout), facts={}, offer=lambda: 2)
except UserError as error:
    print(f"error: {error}", flush=True)
    sys.exit(error.exit_code)
"""


def meet(*facts: str | None, timeout: float = 60, world: int | None = None) -> list[tuple[int, str]]:
    """Each rank's exit code and output; None for one that does not come."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(world or len(facts)), port, str(timeout), each],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, each in enumerate(facts)
        if each is not None
    ]
    try:
        found = []
        for process in processes:
            output = process.communicate(timeout=60)[0]
            found.append((process.returncode, output.strip()))
        return found
    finally:
        for process in processes:
            process.kill()


LAUNCHER = """
import os, subprocess, sys
os.environ.update(LOCAL_SIZE=sys.argv[1])
ranks = [subprocess.Popen([sys.executable, "-c", *line.split("\\t")]) for line in sys.argv[2:]]
sys.exit(max(rank.wait() for rank in ranks))
"""


def test_runs_whose_launchers_have_one_port_never_meet() -> None:
    """Three processes of a run come to the port where two of another meet, and before they do; the two go on."""
    port = str(free_port())

    def launch(world: int, ranks: list[int], timeout: float) -> "subprocess.Popen[str]":
        given = [[str(rank), str(world), port, str(timeout), json.dumps({"a": world})] for rank in ranks]
        lines = ["\t".join([PROGRAM, *each]) for each in given]
        return subprocess.Popen([sys.executable, "-c", LAUNCHER, str(world), *lines], stdout=subprocess.PIPE, text=True)

    foreign = launch(3, [1, 2], 12)
    ours = launch(2, [0, 1], 60)
    try:
        said = ours.communicate(timeout=100)[0].splitlines()
        told = [line for line in said if line.startswith("told")]
        assert (ours.returncode, told) == (0, ["told ['desk', '0'] 1 2"] * 2)
        left = foreign.communicate(timeout=100)[0].splitlines()
        assert foreign.returncode != 0
        assert not [line for line in left if line.startswith("told")]
        assert any("rank 0" in line for line in left)
    finally:
        for launched in (ours, foreign):
            launched.kill()


@pytest.mark.parametrize(
    ("mine", "other", "found"),
    [
        ({"a": 1}, {"a": 1.0}, []),
        ({"a": 1, "b": 2}, {"a": 1}, []),
        ({"a": 1e-3}, {"a": 2e-3}, [("a", 1e-3, 2e-3)]),
        ({"c": {"x": 1, "y": [2]}}, {"c": {"y": [3], "z": 4}}, [("c x", 1, None), ("c y", [2], [3]), ("c z", None, 4)]),
        ({"a": None}, {"a": False}, [("a", None, False)]),
    ],
)
def test_differences(mine: object, other: object, found: object) -> None:
    assert differences(mine, other) == found  # type: ignore[arg-type]


def test_all_hear_the_offer_of_the_first() -> None:
    for code, output in meet('{"a": 1}', '{"a": 1.0}', "{}"):
        assert code == 0
        assert output.splitlines()[-1] == "told ['desk', '0'] 1 3"


def test_a_difference_is_said_to_all_before_all_have_come() -> None:
    """Rank 2 never comes; the others do not wait for it."""
    found = meet('{"--rate": 1}', '{"--rate": 2}', None)
    assert [code for code, _ in found] == [2, 2]
    assert found[0][1].splitlines()[-1] == found[1][1].splitlines()[-1]
    assert "rank 1 on " in found[0][1]
    assert "--rate is 2 there, 1 on rank 0" in found[0][1]


@pytest.mark.parametrize("refuses", [0, 1])
def test_a_refusal_is_heard_by_those_who_come(refuses: int) -> None:
    facts = ["{}", "{}"]
    facts[refuses] = "refuses: no such option"
    code, said = meet(*facts)[1 - refuses]
    assert code == 2
    said = said.splitlines()[-1]
    assert said.startswith(f"error: rank {refuses} on ")
    assert said.endswith("does not start: refuses: no such option")


@pytest.mark.parametrize("absent", [0, 1])
def test_who_does_not_come_is_waited_for_and_named(absent: int) -> None:
    facts: list[str | None] = ["{}", "{}", "{}"]
    facts[absent] = None
    begun = time.monotonic()
    found = meet(*facts, timeout=10)
    # A process that is slow to start hears the verdict before it has anything to say.
    assert any(f"waits for rank {absent}" in output for _, output in found)
    for code, output in found:
        assert code == 1
        error = output.splitlines()[-1]
        assert error.startswith(f"error: rank {absent}")
        assert "did not come within 10 s" in error
    assert time.monotonic() - begun < 50


def test_a_larger_world_on_one_side_ends() -> None:
    """Each believes in another number of processes; the facts say it before anybody waits for the rest."""
    found = meet('{"number": 3}', '{"number": 2}', world=3)
    assert [code for code, _ in found] == [2, 2]


def test_an_offer_that_listens_cannot_take_the_port_of_the_meeting() -> None:
    """The first process makes it when it has that port already."""
    program = f"""
import os, socket
from jllm.parallel import meeting
port = {free_port()}
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
def offer():
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return "taken"
print(meeting.attend(rank=0, world_size=1, timeout=15, facts={{}}, offer=offer).offer)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert run.stdout.strip() == "taken", run.stderr


def test_two_that_say_they_are_the_same(tmp_path: Path) -> None:
    port = str(free_port())
    command = [sys.executable, "-c", PROGRAM, "1", "3", port, "15", "{}"]
    first = subprocess.Popen([sys.executable, "-c", PROGRAM, "0", "3", port, "15", "{}"], stdout=subprocess.DEVNULL)
    twins = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        said = [twin.communicate(timeout=60)[0] for twin in twins]
        assert sum("two processes say that they are rank 1" in each for each in said) == 1
    finally:
        first.kill()
        first.wait()
        for twin in twins:
            twin.kill()
            twin.wait()
