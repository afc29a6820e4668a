"""What links of a cluster take to pass bytes on."""

import dataclasses

from jllm.train.planning.cluster import Cluster


def test_links() -> None:
    """Inside a node at its speed; through several nodes, groups beside each other divide the link between them."""
    found = Cluster(devices=32, devices_per_node=8, memory=1.0, operations=1.0, inside=400e9, between=50e9)
    assert found.sends(1, 4e9) == 0
    assert found.sends(8, 4e9) == 4e9 / 400e9
    assert found.sends(4, 4e9, stride=8) == 4e9 / (50e9 / 8)
    assert found.sends(16, 4e9) == 4e9 / 50e9
    assert found.sends(16, 4e9, stride=2) == 4e9 / 25e9
    assert dataclasses.replace(found, between=1e15).sends(4, 4e9, stride=8) == 4e9 / 400e9, "no faster than inside"
    assert found.sends(3, 4e9) == 4e9 / 50e9, "groups of three lie in two nodes now and then"
    assert dataclasses.replace(found, devices=6).sends(3, 4e9) == 4e9 / 400e9
