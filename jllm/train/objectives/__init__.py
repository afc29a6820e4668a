"""What the last stage computes: final hidden states, a head and the named fields of a micro-batch → sums.

An objective is one file here. Imports torch, `jllm.models.pipeline.head`, `jllm.parallel.tensor` and the shard
contract's constants only.
"""
