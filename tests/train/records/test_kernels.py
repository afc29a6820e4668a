"""The profile's text counts kernels, the time in which any ran, and the waits between them."""

import pytest

from jllm.train.records.kernels import Kernel, report


def test_shares_busy_time_and_waits() -> None:
    kernels = [
        Kernel(name="product", start=10.0, end=16.0),
        Kernel(name="copy", start=14.0, end=18.0),  # beside the product, on another stream
        Kernel(name="product", start=21.0, end=23.0),
    ]
    text = report(kernels, title="step 3, stage 0", seconds=0.02, host_waits={"a.py:3": 1, "b.py:9": 7})
    lines = text.splitlines()
    assert lines[0] == "step 3, stage 0: 20.0 ms, busy 10.0 ms (50.0%), 3 kernels of 2 names"
    assert lines[3].split() == ["8.00", "66.7%", "2", "product"]
    assert lines[4].split() == ["4.00", "33.3%", "1", "copy"]
    assert "waiting 3.0 ms between kernels, longest:" in lines
    assert lines[-5].split() == ["3.00", "after", "copy,", "before", "product"]
    assert lines[-3] == "the host waited for the device 8 times:"
    assert [line.split() for line in lines[-2:]] == [["7", "b.py:9"], ["1", "a.py:3"]]


def test_the_order_of_kernels_does_not_matter() -> None:
    kernels = [Kernel(name=name, start=start, end=start + 2.0) for name, start in (("a", 0.0), ("b", 1.0), ("c", 9.0))]
    one, other = (report(each, title="x", seconds=1.0, host_waits={}) for each in (kernels, kernels[::-1]))
    assert one == other


@pytest.mark.parametrize("seconds", [0.001, 1.0])
def test_a_device_that_ran_nothing(seconds: float) -> None:
    text = report([], title="step 1", seconds=seconds, host_waits={})
    assert text == f"step 1: {seconds * 1000:.1f} ms, no kernels\n"
