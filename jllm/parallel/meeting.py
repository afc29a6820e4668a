"""The processes of a run before they are a process group: who has come, who refuses, and whether all mean the same.

The first process serves the rendezvous store, as `torch.distributed` does later, at the same address. Every process
says there that it has come, with facts about how it was started; one that ends for a mistake says that instead. The
first process compares, and its verdict goes to all.

Where one machine has all processes of a run, they know each other by the launcher that started them, and those of
another run, whose launcher was given the same port, never meet them.

Guarantees: processes that differ, or of which one refuses, all end with one line that says why, within seconds of their
coming. Who waits says every `SAY_SECONDS` for whom, and gives up after the time it was given.
Cost: some messages from each process to the first; nothing where a run is one process.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jllm.errors import UserError, printable, say
from jllm.guards import notation

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

Facts = dict[str, Any]
"""What one process says of its start: a name for people → a JSON value; the same names may be missing elsewhere."""
SAY_SECONDS = 30.0
HOLD_SECONDS = 10.0
"""How long a refusal is kept for processes that come later."""
ABSENT_EXIT_CODE = 1
SHOWN = 3
_POLL_SECONDS = 0.05
_WAIT_SECONDS = 2.0
_LONGEST_VALUE = 60
_NOTHING = "nothing"


def has_several_nodes() -> bool:
    """Whether processes of the run may be on other machines, by what the launcher says."""
    world = os.environ.get("WORLD_SIZE", "1")
    here = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
    return world != "1" and world != here


def differences(mine: Facts, other: Facts) -> list[tuple[str, Any, Any]]:
    """What two processes both speak of and see otherwise: name, value of the one, value of the other.

    Values that are dictionaries are compared by their keys. Numbers are equal by value.
    """
    found: list[tuple[str, Any, Any]] = []
    for name, value in mine.items():
        if name not in other or other[name] == value:
            continue
        there = other[name]
        if isinstance(value, dict) and isinstance(there, dict):
            keys = [*value, *(key for key in there if key not in value)]
            each = [(f"{name} {key}", value.get(key), there.get(key)) for key in keys]
            found += [(key, one, two) for key, one, two in each if one != two]
        else:
            found.append((name, value, there))
    return found


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else _NOTHING if value is None else json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Met:
    """What all know when they have met.

    Attributes:
        offer: a JSON value that the first process gave.
        hosts: of the ranks.
    """

    offer: Any
    hosts: list[str]


class Meeting:
    """One process at the place where all meet.

    Args:
        rank, world_size: of this process.
        number: of the meeting in this process, the same on all.
        timeout: seconds after which who waits gives up.
    """

    def __init__(self, *, rank: int, world_size: int, timeout: float, number: int) -> None:
        self._rank, self._world_size, self._timeout, self._number = rank, world_size, timeout, number
        # Launchers of other machines have other numbers.
        self._launch = "" if has_several_nodes() else f"{os.getppid()}/"
        self._host = socket.gethostname()
        self._deadline = time.monotonic() + timeout
        self._say_at = time.monotonic() + SAY_SECONDS
        self._address = os.environ["MASTER_ADDR"]
        self._port = int(os.environ["MASTER_PORT"])
        self._store = self._open()

    def attend(self, facts: Facts, offer: Callable[[], Any]) -> "Met":
        """Come, wait for all, and hear the verdict.

        The first process makes its offer now, when the store has its port: an offer that listens cannot take that.

        Raises:
            UserError: some differ, one refuses, or some have not come in time.
        """
        self._set(f"here/{self._rank}", {"host": self._host, "facts": facts})
        if self._store.add(self._key(f"count/{self._rank}"), 1) > 1:
            raise UserError(
                f"two processes say that they are rank {self._rank}; give each node a --node_rank of its own"
            )
        self._store.add(self._key("arrived"), 1)
        if self._rank == 0:
            return self._decide(facts, offer())
        try:
            return self._heed()
        except UserError:
            raise
        except RuntimeError:  # a connection that has ended, whatever the version calls it
            raise self._first_is_gone() from None

    def refuse(self, message: str) -> bool:
        """Say that this process ends for a mistake, and give others the time to hear it.

        Returns whether another process of this node, its first one, has said it to the user.
        """
        first = self._rank - int(os.environ.get("LOCAL_RANK", "0"))
        try:
            self._set(f"refused/{self._rank}", {"host": self._host, "message": message})
            self._store.add(self._key("refusals"), 1)
            if self._rank == 0:
                self._end(self._refusal(self._refused()), code=2)
                return False
            until = time.monotonic() + HOLD_SECONDS
            while time.monotonic() < until and not self._store.check([self._key("verdict")]):
                time.sleep(_POLL_SECONDS)
            self._store.add(self._key("heard"), 1)
            return first != self._rank and self._store.check([self._key(f"refused/{first}")])
        except RuntimeError:  # the first process has ended
            return False

    def _open(self) -> "TCPStore":
        from torch._C._distributed_c10d import TCPStore
        from torch.distributed import DistNetworkError

        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        serves = self._rank == 0 and not served
        while not serves:  # the store's own attempts say nothing, and warn when they fail
            with contextlib.suppress(OSError), socket.create_connection((self._address, self._port), timeout=2):
                break
            time.sleep(4 * _POLL_SECONDS)
            if time.monotonic() > self._deadline:
                raise self._absent(f"rank 0 at {self._address}:{self._port}")
            self._say_whom(f"rank 0 at {self._address}:{self._port}")
        try:
            return TCPStore(
                self._address,
                self._port,
                is_master=serves,
                timeout=datetime.timedelta(seconds=max(HOLD_SECONDS, min(self._timeout, 300))),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except DistNetworkError as error:
            where = f"{self._address}:{self._port}"
            if "EADDRINUSE" in str(error):
                raise UserError(
                    f"{where} is taken, probably by another run; give the launcher another port: deepspeed"
                    " --master_port N"
                ) from None
            raise UserError(f"cannot reach the other processes at {where}: {error}") from None

    def _decide(self, facts: Facts, offer: Any) -> "Met":
        hosts = {0: self._host}
        arrived = refusals = 0
        while len(hosts) < self._world_size:
            before = arrived, refusals
            arrived, refusals = (self._store.add(self._key(name), 0) for name in ("arrived", "refusals"))
            if before == (arrived, refusals):
                time.sleep(_POLL_SECONDS)
            else:
                if refusals:
                    self._end_with(self._refusal(self._refused()))
                for rank in self._missing(hosts):
                    if self._store.check([self._key(f"here/{rank}")]):
                        hosts[rank] = self._judge(rank, facts)
            names = ", ".join(f"rank {rank}" for rank in self._missing(hosts)[:8])
            more = len(hosts) + 8 < self._world_size
            waiting_for = f"{names}{' and others' * more} ({len(hosts)} of {self._world_size} are here)"
            if time.monotonic() > self._deadline:
                mistake = self._absent(waiting_for)
                self._end_with(str(mistake), code=mistake.exit_code)
            self._say_whom(waiting_for)
        met = Met(offer=offer, hosts=[hosts[rank] for rank in range(self._world_size)])
        self._set("verdict", dataclasses.asdict(met))
        return met

    def _judge(self, rank: int, facts: Facts) -> str:
        """The host of a process that has come, which means the same."""
        came = self._get(f"here/{rank}")
        found = differences(facts, came["facts"])
        if found:
            said = "; ".join(
                f"{name} is {_shown(there)} there, {_shown(here)} on rank 0" for name, here, there in found[:SHOWN]
            )
            more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            self._end_with(
                f"rank {rank} on {came['host']} differs from rank 0 on {self._host}: {said}{more}; start all nodes"
                " alike"
            )
        host: str = came["host"]
        return host

    def _heed(self) -> "Met":
        while True:
            with contextlib.suppress(RuntimeError):
                self._store.wait([self._key("verdict")], datetime.timedelta(seconds=_WAIT_SECONDS))
            if self._store.check([self._key("verdict")]):
                break
            if time.monotonic() > self._deadline + _WAIT_SECONDS:  # the first process knows who is missing
                raise self._absent(self._who_is_missing())
            if time.monotonic() > self._say_at:
                self._say_whom(self._who_is_missing())
        verdict = self._get("verdict")
        if "mistake" in verdict:
            self._store.add(self._key("heard"), 1)
            raise UserError(verdict["mistake"], exit_code=verdict["code"])
        return Met(**verdict)

    def _who_is_missing(self) -> str:
        absent = [r for r in range(self._world_size) if not self._store.check([self._key(f"here/{r}")])]
        return ", ".join(f"rank {rank}" for rank in absent[:8]) or "rank 0's verdict"

    def _missing(self, known: dict[int, str]) -> list[int]:
        return [rank for rank in range(self._world_size) if rank not in known]

    def _refused(self) -> int:
        return next(r for r in range(self._world_size) if self._store.check([self._key(f"refused/{r}")]))

    def _refusal(self, rank: int) -> str:
        refused = self._get(f"refused/{rank}")
        return f"rank {rank} on {refused['host']} does not start: {refused['message']}"

    def _end_with(self, mistake: str, code: int = 2) -> None:
        """Tell all, and end too.

        Raises:
            UserError: always.
        """
        self._end(mistake, code)
        raise UserError(mistake, exit_code=code)

    def _end(self, mistake: str, code: int) -> None:
        """The store ends with this process: it stays until all have heard, and for some time for those to come."""
        self._set("verdict", {"mistake": mistake, "code": code})
        until = time.monotonic() + HOLD_SECONDS
        while time.monotonic() < until and self._store.add(self._key("heard"), 0) < self._world_size - 1:
            time.sleep(_POLL_SECONDS)

    def _say_whom(self, whom: str) -> None:
        if time.monotonic() < self._say_at:
            return
        self._say_at = time.monotonic() + SAY_SECONDS
        if os.environ.get("LOCAL_RANK", "0") == "0":
            left = max(0, self._deadline - time.monotonic())
            say(f"rank {self._rank} on {self._host} waits for {whom}, {left:.0f} s more")

    def _absent(self, whom: str) -> UserError:
        return UserError(
            f"{whom} did not come within {self._timeout:.0f} s; start all nodes, see that they reach"
            f" {self._address}:{self._port}, or give more --join_timeout",
            exit_code=ABSENT_EXIT_CODE,
        )

    def _first_is_gone(self) -> UserError:
        return UserError(
            f"rank 0 at {self._address}:{self._port} is gone before the run began; its node says why",
            exit_code=ABSENT_EXIT_CODE,
        )

    def _key(self, name: str) -> str:
        return f"jllm/{self._launch}{self._number}/{name}"

    def _set(self, name: str, value: Any) -> None:
        self._store.set(self._key(name), json.dumps(value))

    def _get(self, name: str) -> Any:
        return notation.loads(self._store.get(self._key(name)))


_meetings: list[Meeting | None] = []
"""None for one that did not come about. A store lives as long as its process."""


def attend(*, rank: int, world_size: int, timeout: float, facts: Facts, offer: Callable[[], Any]) -> Met:
    """Meet all processes of the run, which all call this; `offer` is called on the first one.

    Raises:
        UserError: as `Meeting.attend`.
    """
    _meetings.append(None)
    meeting = Meeting(rank=rank, world_size=world_size, timeout=timeout, number=len(_meetings))
    _meetings[-1] = meeting
    return meeting.attend(facts, offer)


def refuse(message: str) -> bool:
    """This process ends for a mistake before it has met the others: they hear of it, if they come in time.

    Does nothing where the run is on one node, whose launcher ends the others, nor after the meeting. Returns whether
    another process has told the user.
    """
    if _meetings or "RANK" not in os.environ or not has_several_nodes() or "MASTER_PORT" not in os.environ:
        return False
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        meeting = Meeting(rank=rank, world_size=world_size, timeout=HOLD_SECONDS, number=1)
    except (UserError, ValueError):
        return False  # nobody to tell
    _meetings.append(meeting)
    return meeting.refuse(printable(message))
