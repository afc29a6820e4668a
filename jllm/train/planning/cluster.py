"""The devices and links that a plan is for."""

import dataclasses

PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10": 125e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 155e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
}
"""Dense 16-bit tensor operations a second, by the vendors' datasheets; the first name that the device's contains."""


def peak_of(name: str) -> float | None:
    """Operations a second that a device of this name could do at most; None where that is not known."""
    return next((flops for part, flops in PEAK_FLOPS.items() if part.lower() in name.lower()), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of equal devices.

    Attributes:
        devices: in all nodes.
        devices_per_node: that reach each other over the links inside a node.
        memory: bytes of a device that a run may fill.
        operations: a second that one device could do at most, in 16 bits, dense.
        inside: bytes a second that a device sends and receives at the same time inside its node.
        between: bytes a second between two nodes, for all devices of a node together.
    """

    devices: int
    devices_per_node: int
    memory: float
    operations: float
    inside: float
    between: float

    def holds(self, ranks: int) -> bool:
        """Whether groups of so many consecutive ranks never lie in two nodes."""
        return self.devices_per_node % ranks == 0 or self.devices <= self.devices_per_node

    def sends(self, size: int, bytes_of_each: float, *, stride: int = 1) -> float:
        """Seconds in which each of `size` devices passes `bytes_of_each` on to its neighbour in a ring.

        Groups whose members are `stride` ranks apart lie beside each other and send at the same time.
        """
        if size == 1:
            return 0.0
        if self.holds(size * stride):
            return bytes_of_each / self.inside
        # A ring through several nodes leaves each of them once, and so do the rings beside it.
        return bytes_of_each / min(self.inside, self.between / min(stride, self.devices_per_node))
