"""How a run ends, and the exit code that tells a scheduler what to do then.

| code | what it says |
| --- | --- |
| 0 | done: all steps are made, the run stopped early, or `save_quit` was asked for |
| 75 | the state is saved, start the same line again: a time limit, or SIGTERM |
| 3 | the state is saved, a person is needed: a loss that is not finite, data that cannot be read |
| 130 | Ctrl-C: the state is saved where there is a `--checkpoint` |
| 143 | SIGTERM, and nothing could be saved |
| 2 | a mistake in options, model or data, or a folder that cannot be written to |
| 1 | another process of the run is gone, or a defect |

75 is EX_TEMPFAIL of sysexits.h.
"""

import enum

from jllm.errors import UserError

AGAIN_EXIT_CODE = 75
PERSON_EXIT_CODE = 3
INTERRUPT_EXIT_CODE = 130
SIGTERM_EXIT_CODE = 143


class StoppedError(UserError):
    """Training cannot go on. Every process raises it at the same step; weights and state are good.

    The run saves them, and ends with `PERSON_EXIT_CODE`.
    """


class Ending(enum.Enum):
    """Why a run leaves its steps."""

    COMPLETE = "complete"
    EARLY_STOP = "early stop"
    SAVE_QUIT = "save_quit"
    TIME_LIMIT = "time limit"
    SIGTERM = "SIGTERM"
    INTERRUPT = "Ctrl-C"

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do but to export."""
        return self in (Ending.COMPLETE, Ending.EARLY_STOP, Ending.SAVE_QUIT)

    def exit_code(self, *, is_saved: bool) -> int:
        """The exit code of the run.

        Args:
            is_saved: whether the same line goes on from here.
        """
        if self.is_done:
            return 0
        if self is Ending.INTERRUPT:
            return INTERRUPT_EXIT_CODE
        return AGAIN_EXIT_CODE if is_saved else SIGTERM_EXIT_CODE
