"""What the last stage computes: final hidden states, a head and the named fields of a micro-batch → sums.

An objective is one file here. Imports torch, `jllm.models.pipeline.head`, `jllm.models.sequence_parallel.share`,
`jllm.parallel` and the shard contract's constants only.
"""
