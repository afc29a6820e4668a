"""Models: transformers' own classes, cut into pipeline stages, with their weights in Hugging Face format.

Here is what is done to a whole model or stage: attention kernels, what trains, recomputation, router balance, and the
catalogue of families. Imports torch, transformers, `jllm.parallel` and the ground; never `jllm.train`, and nothing here
imports in a circle.
"""
