"""A port for the processes of a run to meet at, picked before any of them listens.

Guarantee: no connection and no listener that lets the system choose can take the port between the pick and its use, as
the system chooses from a range of its own (`ip_local_port_range`) and these are picked below it. Two who pick at the
same moment rarely pick the same.
"""

import contextlib
import random
import socket
from pathlib import Path

LOWEST = 10000
"""Programs that people know by their port are mostly below it."""
_SYSTEMS_OWN = Path("/proc/sys/net/ipv4/ip_local_port_range")
_ATTEMPTS = 100


def free_port() -> int:
    """A port of this machine that nobody listens on now, and that the system gives to nobody by itself.

    Where the system's own range leaves too little room, it is one of that range.
    """
    first = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        first = int(_SYSTEMS_OWN.read_text().split()[0])
    picked = random.SystemRandom()  # a seed that the user gave is not for this
    candidates = [picked.randrange(LOWEST, first) for _ in range(_ATTEMPTS)] if first > LOWEST + _ATTEMPTS else []
    for port in [*candidates, 0]:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    raise OSError("no free port on this machine")
