"""`python -m tests.security.fuzz [--seconds 600] [--seed N] [--first N --target NAME]`: readers against changed files.

All targets take turns. Exit code 1 where anything was found; a finding is repeated by its seed, number and target.
"""

import argparse
import random
import sys

from jllm.errors import say
from tests.security.fuzz.harness import run_target
from tests.security.fuzz.targets import TARGETS


def main() -> int:
    """Run, and report."""
    parser = argparse.ArgumentParser(prog="fuzz")
    parser.add_argument("--seconds", type=float, default=600, help="for all targets together")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--first", type=int, help="this run of --target alone")
    parser.add_argument("--target", help="one target alone")
    given = parser.parse_args()
    chosen = [target for target in TARGETS if given.target in (None, target.name)]
    say(f"seed {given.seed}; {', '.join(target.name for target in chosen)}")
    problems = 0
    for target in chosen:
        most = 1 if given.first is not None else 1 << 40
        runs, found = run_target(target, given.seed, given.seconds / len(chosen), first=given.first or 0, most=most)
        kinds = {text.rsplit("\n", 2)[-2] if "\n" in text else text: text for text in found}
        say(f"{target.name}: {runs:,} runs, {len(found):,} findings")
        for text in list(kinds.values())[:10]:
            say(text)
        problems += len(found)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
