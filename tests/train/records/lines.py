"""The form of the lines that a run shows."""

import re

CLOCK = r"(?:\d+:)?\d?\d:\d\d"


STEP_LINE = re.compile(
    r"step \d+/\d+  (?:loss (?:\d+\.\d{4}|nan|inf)|skipped)  epoch \d+\.\d\d  lr \d[\d.e+-]*"
    r"(?:  grad norm (?:\d+\.\d{3}|nan|inf))?  [\d,]+ tokens/s(?:  MFU \d+\.\d%)?  data wait \d+\.\d%"
    rf"  memory \d+\.\d GiB  elapsed {CLOCK}  left {CLOCK}"
)


EVALUATION_LINE = re.compile(
    r"evaluation on \S+ (?:before the first step|after step \d+/\d+)  loss \d+\.\d{4}  perplexity (?:\d+\.\d{3}|inf)"
    r"  accuracy \d+\.\d\d%  [\d,]+ tokens in \d+\.\d s"
)


ESTIMATE_LINE = re.compile(rf"about {CLOCK} to go for the other [\d,]+ steps, at the pace so far")
