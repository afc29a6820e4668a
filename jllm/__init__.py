"""jllm: raw text and chat logs to token-id shards, a global shuffle, and a pipeline-parallel trainer.

Where the package is the program, it leaves the working folder here, before anything else is imported.
"""

from jllm.children import is_our_program, seal

if is_our_program():
    seal()

__version__ = "0.1.0"
