"""What a device ran during a step, as text: the kernels that took most of it, and where it waited.

Times are the device's, in milliseconds. Kernels of several streams may overlap: shares are of the sum of all kernels,
`busy` is the time in which any of them ran.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

PROFILE_NAME = "profile-step-{step}-rank-{rank}.txt"
MOST_KERNELS, MOST_GAPS = 40, 10
NAME_WIDTH = 110


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One run of a kernel.

    Attributes:
        name: as the profiler has it.
        start, end: in milliseconds, from any zero.
    """

    name: str
    start: float
    end: float


def report(kernels: Sequence[Kernel], *, title: str, seconds: float, host_waits: Mapping[str, int]) -> str:
    """The text.

    Args:
        kernels: of one device, in any order.
        title: the first line.
        seconds: that the step took, by the clock.
        host_waits: how often the host waited for the device, by the place in the code.
    """
    if not kernels:
        return f"{title}: {seconds * 1000:.1f} ms, no kernels\n"
    ordered = sorted(kernels, key=lambda each: each.start)
    waits, busy, reached, last = [], 0.0, ordered[0].start, ""
    for each in ordered:
        if each.start > reached:
            waits.append((each.start - reached, last, each.name))
        busy += max(0.0, each.end - max(each.start, reached))
        if each.end > reached:
            reached, last = each.end, each.name
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for each in kernels:
        times[each.name] += each.end - each.start
        counts[each.name] += 1
    total = sum(times.values())
    lines = [
        f"{title}: {seconds * 1000:.1f} ms, busy {busy:.1f} ms ({busy / (seconds * 1000):.1%}), "
        f"{len(kernels):,} kernels of {len(times)} names",
        "",
        f"{'ms':>10} {'share':>6} {'runs':>7}  kernel",
    ]
    for name in sorted(times, key=lambda name: (-times[name], name))[:MOST_KERNELS]:
        lines.append(f"{times[name]:10.2f} {times[name] / total:6.1%} {counts[name]:7,}  {name[:NAME_WIDTH]}")
    lines += ["", f"waiting {sum(wait for wait, *_ in waits):.1f} ms between kernels, longest:"]
    for wait, before, after in sorted(waits, reverse=True)[:MOST_GAPS]:
        lines.append(f"{wait:10.2f}  after {before[: NAME_WIDTH // 2]}, before {after[: NAME_WIDTH // 2]}")
    lines += ["", f"the host waited for the device {sum(host_waits.values())} times:"]
    lines += [f"{host_waits[each]:10}  {each}" for each in sorted(host_waits, key=lambda each: -host_waits[each])]
    return "\n".join(lines) + "\n"
