"""Who of a run's processes is still there: a lost or silent one ends all others, and is named.

Every process keeps a connection to the first one, on which both send a line each second. A connection that closes
without a word says that its process is gone: killed, out of memory, its machine lost. Silence says that it stands still
(stopped, a dead link, a machine that hangs); that is borne for `--timeout` seconds.

Guarantees: when a process is gone, all others have ended within seconds, whatever they are waiting in. One line, on one
process, names it, its host and its step. Of a mistake that several processes meet, one speaks.
Cost: a thread in each process, and a message of some bytes each second.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

from jllm.errors import printable, say
from jllm.guards import notation

BEAT_SECONDS = 1.0
GRACE_SECONDS = 6.0
"""How long the others may take to meet the mistake that one process has met."""
ANSWER_SECONDS = 3.0
JOIN_SECONDS = 15.0
"""How long after the first process the last one may join, all of which have met before."""
LOST_EXIT_CODE = 1
_STEP, _GOODBYE, _MISTAKE, _ASKED = "step", "goodbye", "mistake", "asked"
_BEAT, _SPEAK, _END, _FIRST_LEAVES = "beat", "speak", "end", "first leaves"


class _Line:
    """A connection that carries JSON objects, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._rest = b""
        self._sending = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Send, or not where nobody is there any more: who reads the connection finds out."""
        with contextlib.suppress(OSError), self._sending:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come since; None where the connection has ended."""
        try:
            read = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not read:
            return None
        *lines, self._rest = (self._rest + read).split(b"\n")
        try:
            found = [notation.loads(line) for line in lines]
        except ValueError:  # whoever it is speaks another language
            return None
        return found if all(isinstance(each, dict) for each in found) and len(self._rest) < 1 << 16 else None


@dataclasses.dataclass(kw_only=True)
class _Known:
    """What the first process knows of another one."""

    rank: int
    host: str
    step: int
    heard: float
    has_left: bool = False
    is_asked: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class _Desk:
    """On the first process: hears from everyone, and tells everyone when the run is over."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self.token = uuid.uuid4().hex
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=both)
        self.port: int = self._listener.getsockname()[1]
        self._known: dict[_Line, _Known | None] = {}
        self._joined: set[int] = set()
        self._expected: dict[int, str] = {}
        self._expected_at = 0.0
        self._speaker: int | None = None
        self._over_at: float | None = None
        threading.Thread(target=self._serve, name="peers-desk", daemon=True).start()

    def expect(self, hosts: Sequence[str]) -> None:
        """From now on all these join, within seconds; a host for each rank."""
        self._expected_at = time.monotonic() + JOIN_SECONDS
        self._expected = dict(enumerate(hosts))

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            beat_at = time.monotonic()
            while True:
                ready = selector.select(BEAT_SECONDS)
                if time.monotonic() - beat_at > self._timeout and self._speaker is None:
                    self._speaker = 0  # this process stood still: the others have ended, and said so
                for key, _ in ready:
                    if key.data is None:
                        line = _Line(self._listener.accept()[0])
                        self._known[line] = None
                        selector.register(line.socket, selectors.EVENT_READ, line)
                    elif not self._hear(key.data):
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                if now - beat_at >= BEAT_SECONDS:
                    # A desk that stood still itself heard nobody meanwhile: what waits in its queues is heard first.
                    if now - beat_at < self._timeout:
                        self._find_silent(now)
                    self._tell_all({_BEAT: True})
                    beat_at = now
                if self._over_at is not None and now >= self._over_at:
                    self._end_all()

    def _hear(self, line: _Line) -> bool:
        """Take what a process says; whether it is still there. Who does not know the token is no process of the run."""
        messages = line.receive()
        if self._known[line] is None and messages and messages[0].pop("token", None) != self.token:
            messages = None
        if messages is None:
            line.socket.close()
            known = self._known.pop(line)
            if known is not None and not known.has_left:
                self._over(f"{known} is gone, at step {known.step}: the run ends")
            return False
        for message in messages:
            if "rank" in message:
                self._known[line] = _Known(**message, step=0, heard=time.monotonic())
                self._joined.add(message["rank"])
            known = self._known[line]
            if known is None:
                continue
            known.heard = time.monotonic()
            known.step = message.get(_STEP, known.step)
            known.has_left |= _GOODBYE in message
            if _ASKED in message:
                known.is_asked = True
                asked = [each.rank for each in self._known.values() if each is not None and each.is_asked]
                self._tell_all({_ASKED: asked})
            if known.rank == 0 and (_GOODBYE in message or _MISTAKE in message):
                self._tell_all({_FIRST_LEAVES: True}, but=0)
            if _MISTAKE in message:
                known.has_left = True
                if self._speaker is None:
                    self._speaker = known.rank
                    self._over_at = time.monotonic() + GRACE_SECONDS
                line.send({_SPEAK: self._speaker == known.rank})
        return True

    def _find_silent(self, now: float) -> None:
        absent = [rank for rank in self._expected if rank not in self._joined]
        if absent and now > self._expected_at:
            rank, host = absent[0], self._expected[absent[0]]
            self._over(f"rank {rank} on {host} is gone, before it joined: the run ends")
        for known in self._known.values():
            if known is not None and not known.has_left and now - known.heard > self._timeout:
                self._over(f"{known} has stood still for {self._timeout:.0f} s, at step {known.step}: the run ends")

    def _over(self, why: str) -> None:
        """A process is lost: everyone ends now, and this one says why, unless somebody has said so."""
        if self._speaker is None:
            self._speaker = 0
            self._tell_all({_END: None}, but=0)
            end_lost(why)
        self._end_all()

    def _end_all(self) -> None:
        """This process last: once it has ended, the others would take it for lost."""
        self._tell_all({_END: None}, but=0)
        self._tell_all({_END: None})

    def _tell_all(self, message: dict[str, Any], *, but: int | None = None) -> None:
        for line, known in self._known.items():
            if known is None or known.rank != but:
                line.send(message)


class Peers:
    """This process's connection to the first one.

    Args:
        rank: of this process.
        host: of the first process.
        port, token: of its desk.
        timeout: seconds of silence that are borne.
    """

    def __init__(self, *, rank: int, host: str, port: int, token: str, timeout: float) -> None:
        self._rank, self._host, self._timeout = rank, host, timeout
        self._line = _Line(socket.create_connection((host, port), timeout=timeout))
        self._line.socket.settimeout(None)
        self._line.send({"token": token, "rank": rank, "host": socket.gethostname()})
        self._step = 0
        self._has_left = self._first_leaves = False
        self.asked: list[int] = []
        self._answer: bool | None = None
        self._answered = threading.Event()
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def at_step(self, step: int) -> None:
        """Say which step this process is making."""
        self._step = step

    def leave(self) -> None:
        """This process ends in order: the others do too, or need it no longer."""
        self._has_left = True
        self._line.send({_GOODBYE: True})

    def ask_to_end(self) -> None:
        """Tell the others that this process is asked to end."""
        self._line.send({_ASKED: True})

    def may_speak(self) -> bool:
        """This process ends for a mistake; whether it is the one that says so. All others end too."""
        self._has_left = True
        self._line.send({_MISTAKE: True})
        self._answered.wait(ANSWER_SECONDS)
        return self._answer is not False

    def _watch(self) -> None:
        heard = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._line.socket, selectors.EVENT_READ)
            while True:
                begun = time.monotonic()
                messages = self._line.receive() if selector.select(BEAT_SECONDS) else []
                now = time.monotonic()
                if messages is None:
                    self._first_is_lost("is gone")
                    return
                if messages or now - begun > self._timeout / 2:  # it may have been this process that stood still
                    heard = now
                for message in messages:
                    if _SPEAK in message:
                        self._answer = bool(message[_SPEAK])
                        self._answered.set()
                    self.asked = message.get(_ASKED, self.asked)
                    self._first_leaves |= _FIRST_LEAVES in message
                    if _END in message and not self._has_left:
                        os._exit(LOST_EXIT_CODE)
                if now - heard > self._timeout + 2 * BEAT_SECONDS:
                    self._first_is_lost(f"has stood still for {self._timeout:.0f} s")
                    return
                self._line.send({_STEP: self._step})

    def _first_is_lost(self, what: str) -> None:
        if self._answer is None:
            self._answer = not self._first_leaves  # which has said why, if anything is to be said
        self._answered.set()
        if self._first_leaves:
            time.sleep(GRACE_SECONDS)
        elif self._rank == 1 and not self._has_left:
            end_lost(f"rank 0 on {self._host} {what}, at step {self._step}: the run ends")
        else:
            time.sleep(BEAT_SECONDS)  # for the line of the one that speaks
        if not self._has_left:
            os._exit(LOST_EXIT_CODE)


def end_lost(why: str) -> None:
    """Say why and end, whatever the main thread is waiting in."""
    with contextlib.suppress(OSError, ValueError):
        say(f"error: {printable(why)}", file=sys.stderr, flush=True)
    os._exit(LOST_EXIT_CODE)


_mine: Peers | None = None
_desks: list[_Desk] = []


Desk = tuple[int, str]
"""Port and token of the first process's desk."""


def open_desk(timeout: float) -> Desk | None:
    """On the first process: what all need to know to join; None where they have joined before."""
    if _mine is not None:
        return None
    _desks.append(_Desk(timeout))
    return _desks[-1].port, _desks[-1].token


def join(*, rank: int, world_size: int, timeout: float, desk: Desk | None = None, hosts: Sequence[str] = ()) -> None:
    """Watch each other from now on; every process calls it.

    `desk` is what `open_desk` said on the first process; where nobody was told, the process group tells. `hosts` are
    those of the ranks, all of which are about to join.
    """
    import torch.distributed as dist

    global _mine
    if world_size == 1 or _mine is not None:
        return
    if desk is None:
        told: list[Any] = [open_desk(timeout) if rank == 0 else None]
        dist.broadcast_object_list(told, src=0)
        desk = told[0]
    assert desk is not None
    if rank == 0:
        _desks[-1].expect(hosts)
    _mine = Peers(rank=rank, host=os.environ["MASTER_ADDR"], port=desk[0], token=desk[1], timeout=timeout)


def at_step(step: int) -> None:
    """Say which step this process is making."""
    if _mine is not None:
        _mine.at_step(step)


def leave() -> None:
    """Before the last thing that all processes do together: this one ends in order after it."""
    if _mine is not None:
        _mine.leave()


def ask_to_end() -> None:
    """Tell the others that this process is asked to end."""
    if _mine is not None:
        _mine.ask_to_end()


def asked_to_end() -> list[int]:
    """The ranks that are known to be asked to end, this one's own included where it is not alone."""
    return _mine.asked if _mine is not None else []


def may_speak() -> bool | None:
    """Whether this process is the one to report a mistake; None where it does not know of the others."""
    return None if _mine is None else _mine.may_speak()
