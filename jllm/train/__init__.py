"""The trainer: a run from its options to its exported folder.

Imports everything but commands: `jllm.models`, `jllm.parallel`, `jllm.data`. What a command's `--help` needs (`config`)
imports nothing heavy.
"""

import jllm.models  # noqa: F401  # before transformers, whose imports it quietens
