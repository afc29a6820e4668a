"""The form of the lines that a run shows."""

import re

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ  "
"""What each line begins with."""


def without_times(console: str) -> list[str]:
    """The lines of a console without the time that they begin with."""
    return [re.sub(f"^{TIME}", "", line) for line in console.splitlines()]


CLOCK = r"(?:\d+:)?\d?\d:\d\d"


STEP_LINE = re.compile(
    TIME + r"step \d+/\d+  (?:loss (?:\d+\.\d{4}|nan|inf)|skipped)  epoch \d+\.\d\d  lr \d[\d.e+-]*"
    r"(?:  grad norm (?:\d+\.\d{3}|nan|inf))?  [\d,]+ tokens/s(?:  MFU \d+\.\d%)?  data wait \d+\.\d%"
    rf"  memory \d+\.\d GiB  elapsed {CLOCK}  left {CLOCK}"
)


EVALUATION_LINE = re.compile(
    TIME
    + r"evaluation on \S+ (?:before the first step|after step \d+/\d+)  loss \d+\.\d{4}  perplexity (?:\d+\.\d{3}|inf)"
    r"  accuracy \d+\.\d\d%  [\d,]+ tokens in \d+\.\d s"
)


ESTIMATE_LINE = re.compile(rf"{TIME}about {CLOCK} to go for the other [\d,]+ steps, at the pace so far")
