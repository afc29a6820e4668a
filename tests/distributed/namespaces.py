"""Two network namespaces with a link between them: two machines, as far as the network goes."""

import os
import shutil
import subprocess
from types import TracebackType

ADDRESSES = ("10.213.7.1", "10.213.7.2")
PREFIX_BITS = 24


def why_not() -> str | None:
    """Why there are no namespaces here; None where there are."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no `ip`"
    name = f"jllm-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"network namespaces are not allowed: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=False)
    return None


class Namespaces:
    """Two of them while the context lasts; `names` to run commands in."""

    def __init__(self) -> None:
        self.names = [f"jllm-{os.getpid()}-{each}" for each in (0, 1)]
        self._links = [f"jl{os.getpid()}n{each}" for each in (0, 1)]

    def __enter__(self) -> "Namespaces":
        for name in self.names:
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", self._links[0], "type", "veth", "peer", "name", self._links[1])
        for name, link, address in zip(self.names, self._links, ADDRESSES, strict=True):
            _run("ip", "link", "set", link, "netns", name)
            _run("ip", "-n", name, "addr", "add", f"{address}/{PREFIX_BITS}", "dev", link)
            _run("ip", "-n", name, "link", "set", link, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)

    def inside(self, node: int, command: list[str]) -> list[str]:
        """The command in a namespace."""
        return ["ip", "netns", "exec", self.names[node], *command]

    def environment(self, node: int) -> dict[str, str]:
        """What makes gloo take the link."""
        return {"GLOO_SOCKET_IFNAME": self._links[node]}

    def shape(self, *queue: str, node: int = 1) -> bool:
        """Give a node's end a queue discipline of `tc`, such as "netem delay 100ms"; whether the kernel has it."""
        command = ["ip", "netns", "exec", self.names[node], "tc", "qdisc", "replace", "dev", self._links[node], "root"]
        return subprocess.run([*command, *queue], capture_output=True, check=False).returncode == 0

    def cut(self) -> None:
        """Take the link down at node 1's end."""
        _run("ip", "-n", self.names[1], "link", "set", self._links[1], "down")

    def mend(self) -> None:
        """The link is back."""
        _run("ip", "-n", self.names[1], "link", "set", self._links[1], "up")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
