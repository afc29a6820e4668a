"""The one exception for a user's mistake.

Whoever finds a mistake raises `UserError` with a single line that says what was given, what is allowed, and what to
do. The command line (`jllm.options`) prints that line to standard error and exits with code 2; no traceback is shown.
Everything else that is raised is a defect of ours, or of the machine, and keeps its traceback.
"""

import difflib
import os
import sys
import time
from collections.abc import Iterable

EXIT_CODE = 2
PEER_SECONDS = 6.0


class UserError(Exception):
    """A mistake in what the user gave: options, files, data. The message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' for the known name nearest to `given`, or an empty string where none is near."""
    matches = difflib.get_close_matches(given, list(known), n=1)
    return f' Did you mean "{matches[0]}"?' if matches else ""


def report(message: str) -> None:
    """Print a mistake on standard error, once for all the processes that a launcher started on this node.

    They usually meet the same mistake at the same time. The first of them prints it at once and ends, and the launcher
    then ends the others; one that is still there after `PEER_SECONDS` met it alone, and prints it.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PEER_SECONDS)
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
