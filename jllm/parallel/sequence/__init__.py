"""Sequence parallelism: which tokens of a row a process has, and how heads and keys pass between processes.

Imports torch and `jllm.parallel.mesh`; what attention makes of it is said by `jllm.models.sequence_parallel`.
"""
