"""Tensor parallelism: what a process has of a tensor, layers that compute with their part, and sums over the ranks.

Each process holds plain tensors, its slices, and no distributed ones. What a slice is of stays with its parameter.
Imports torch and `jllm.parallel.mesh`; which layer of a model is cut how is said by `jllm.models.tensor_parallel`.
"""
