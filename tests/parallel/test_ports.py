"""Ports to meet at are not those that the system gives away."""

import socket
from pathlib import Path

import pytest

from jllm.parallel import ports


def test_a_port_is_free_and_below_the_systems_own() -> None:
    own = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found = {ports.free_port() for _ in range(200)}
    assert len(found) > 100
    assert all(ports.LOWEST <= port < own for port in found)
    for port in found:
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_a_port_that_is_taken_is_not_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All ports of a small range are taken but one."""
    (tmp_path / "range").write_text(f"{ports.LOWEST + 102}\t60999\n")
    monkeypatch.setattr(ports, "_SYSTEMS_OWN", tmp_path / "range")
    given = []
    try:
        for _ in range(60):
            port = ports.free_port()
            assert port not in {server.getsockname()[1] for server in given}
            given.append(socket.create_server(("", port)))
    finally:
        for server in given:
            server.close()


@pytest.mark.parametrize("told", ["", "1024\t65535\n", "not a range"])
def test_without_room_below_the_systems_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: str) -> None:
    (tmp_path / "range").write_text(told)
    monkeypatch.setattr(ports, "_SYSTEMS_OWN", tmp_path / "range")
    with socket.create_server(("127.0.0.1", ports.free_port())):
        pass
