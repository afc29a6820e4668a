"""The one exception for a user's mistake.

Whoever finds a mistake raises `UserError` with a single line that says what was given, what is allowed, and what to
do. The command line (`jllm.options`) prints that line to standard error and exits with code 2; no traceback is shown.
Everything else that is raised is a defect of ours, or of the machine, and keeps its traceback.
"""

import difflib
from collections.abc import Iterable

EXIT_CODE = 2


class UserError(Exception):
    """A mistake in what the user gave: options, files, data. The message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' for the known name nearest to `given`, or an empty string where none is near."""
    matches = difflib.get_close_matches(given, list(known), n=1)
    return f' Did you mean "{matches[0]}"?' if matches else ""
