"""What a run does when a fast path fails its proof: it says so, and starts over without it.

Two fast paths prove themselves as they go: the fast engine (`EngineMismatchError`), and the short cut for plain
conversations (`ShortCutError`). The local command and the Spark job try the same settings in the same order.

Guarantees: no path is taken again after it failed, so a run starts over at most once for each.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jllm.data.chat.short_cut import ShortCutError
from jllm.data.tokenizer.checked_engine import CheckedEngine, EngineMismatchError
from jllm.errors import UserError, say

PROOF_ERRORS = (EngineMismatchError, ShortCutError)
HF_ENGINE, NO_SHORT_CUT = "hf engine", "no short cut"
WAYS_OUT = (HF_ENGINE, NO_SHORT_CUT)
"""What a run starts over with, as it is noted in the work folder."""
_SAID = {HF_ENGINE: "with the hf engine", NO_SHORT_CUT: "without the short cut"}

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """The settings of one attempt.

    Attributes:
        choice: `--engine`.
        reasons: for each of `WAYS_OUT` that is taken: which proof failed, and where.
    """

    choice: str
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def engine(self) -> str:
        """The engine to open: `auto`, or one by name."""
        return "hf" if HF_ENGINE in self.reasons and self.choice == "auto" else self.choice

    @property
    def short_cut(self) -> bool:
        """Whether plain conversations take the short cut."""
        return NO_SHORT_CUT not in self.reasons

    def record_of(self, engine: CheckedEngine) -> dict[str, Any]:
        """What the manifest says of the engine: its name and version, why it is not the fast one, and the number of
        strings on which it was proven."""
        reason = self.reasons.get(HF_ENGINE) or engine.reason
        return {"name": engine.name, "version": engine.version, "reason": reason, "probes": engine.probes}

    def after(self, error: Exception) -> "Attempt":
        """The settings to go on with after one of `PROOF_ERRORS`, which is said.

        Raises:
            UserError: the fast engine failed, and no other may be taken.
        """
        way_out = HF_ENGINE if isinstance(error, EngineMismatchError) else NO_SHORT_CUT
        if way_out == HF_ENGINE and self.choice == "fastokens":
            raise UserError(f"--engine fastokens: {error}; use --engine auto or hf") from None
        assert way_out not in self.reasons
        say(f"{error}; starting over {_SAID[way_out]}", file=sys.stderr, flush=True)
        return dataclasses.replace(self, reasons={**self.reasons, way_out: str(error)})


def attempts(
    run: Callable[[Attempt], Result], first: Attempt, start_over: Callable[[Attempt], None] = lambda _: None
) -> Result:
    """The result of the first attempt whose fast paths hold.

    Args:
        run: raises one of `PROOF_ERRORS` where one does not.
        first: the settings to begin with.
        start_over: removes what the last attempt made; it is given the next one.

    Raises:
        UserError: see `Attempt.after`.
    """
    attempt = first
    while True:
        try:
            return run(attempt)
        except PROOF_ERRORS as error:
            attempt = attempt.after(error)
            start_over(attempt)
