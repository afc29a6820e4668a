"""Checkpoints whose code transformers no longer carries, read into the nearest class that it does carry.

`alibi`, `layouts` and `reading` import errors only: loading and saving call them. `rewriting`, the work of a command,
stands above `jllm.models.weights`.
"""
