"""The one exception for a user's mistake.

Whoever finds a mistake raises `UserError` with a single line that says what was given, what is allowed, and what to
do. The command line (`jllm.options`) prints that line to standard error and exits with code 2; no traceback is shown.
What a file system refuses is such a mistake too, wherever it is met (`of_file_system`). Everything else that is raised
is a defect of ours, or of the machine, and keeps its traceback.

Guarantees: no control code of a message, or of what went through `printable`, reaches a terminal.
"""

import difflib
import errno
import os
import re
import sys
import time
from collections.abc import Iterable
from typing import TextIO

EXIT_CODE = 2
PEER_SECONDS = 6.0


# C0 and C1 control codes but tab and line feed, what turns the direction of writing, and halves of surrogate pairs,
# which stand for bytes of file names that are no UTF-8.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_ALSO_WITHOUT_PATH = (*_FULL, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.ESTALE)
"""What nothing but a file system says, so that it counts also where no path is known."""
_OF_FILE_SYSTEMS = {
    *(errno.EBUSY, errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.EMLINK, errno.ENAMETOOLONG),
    *(errno.ENODEV, errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.ENOTSUP, errno.ENXIO, errno.EOVERFLOW),
    *(errno.ETXTBSY, errno.EXDEV, *_FORBIDDEN, *_ALSO_WITHOUT_PATH),
}


class UserError(Exception):
    """A mistake in what the user gave: options, files, data. The message is one line.

    Attributes:
        exit_code: of a command that ends by it.
    """

    def __init__(self, message: str, *, exit_code: int = EXIT_CODE) -> None:
        super().__init__(printable(" ".join(message.split())))
        self.exit_code = exit_code


def printable(text: str) -> str:
    """Text from data, file names and the like as a terminal may get it: control codes become escapes, as `\\x1b`."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(
    *values: object,
    sep: str = " ",
    end: str = "\n",
    file: TextIO | None = None,
    flush: bool = True,
    styled: bool = False,
) -> None:
    """`print` for everything that is ours to say: what it is given may hold names and texts from data.

    `sep` and `end` are printed as they are, in one piece with the texts; so is what is `styled`, whose texts went
    through `printable` before they got colours.
    """
    texts = map(str, values) if styled else (printable(str(value)) for value in values)
    # In one piece: what several processes write to one place would else come between a line and its end.
    print(sep.join(texts) + end, end="", file=file, flush=flush)


def of_file_system(error: OSError | RuntimeError) -> UserError | None:
    """What a file system refused, as a mistake that names the path and the reason; None where it is something else.

    `Path.resolve` makes a RuntimeError of a link that leads to itself; the reason is what it was made of.
    """
    if not isinstance(error, OSError):
        return of_file_system(error.__context__) if isinstance(error.__context__, OSError) else None
    named = [path for path in (error.filename, error.filename2) if isinstance(path, str | bytes | os.PathLike)]
    if error.errno is None or error.errno not in (_OF_FILE_SYSTEMS if named else _ALSO_WITHOUT_PATH):
        return None
    place = " and ".join(map(os.fsdecode, named)) or "a file"
    reason = os.strerror(error.errno)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = f"the disk is full ({reason})"
    if error.errno in _FULL:
        advice = "free some space and run the same command again: what is finished stays"
    elif error.errno in _FORBIDDEN:
        advice = "allow it, or give another place"
    else:
        advice = "put that right and run the same command again"
    return UserError(f"{place}: {reason}; {advice}")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' for the known name nearest to `given`, or an empty string where none is near."""
    matches = difflib.get_close_matches(given, list(known), n=1)
    return f' Did you mean "{matches[0]}"?' if matches else ""


def report(message: str, *, speaks: bool | None = None) -> None:
    """Print a mistake on standard error, once for all processes of a run.

    Args:
        message: the mistake.
        speaks: whether this process is the one that says it. None where the processes do not know of each other: those
            that a launcher started on this node usually meet the same mistake at the same time. The first of them
            prints it at once and ends, and the launcher then ends the others; one that is still there after
            `PEER_SECONDS` met it alone, and prints it.
    """
    if speaks is False:
        return
    if speaks is None and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PEER_SECONDS)
    say(f"error: {UserError(message)}", file=sys.stderr)
