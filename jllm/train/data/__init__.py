"""Shards to steps of micro-batches: opening, order, rows, batching, loading, collation.

Imports `jllm.data` for the contract on disk, and of `jllm.models` what a micro-batch is sent as.
"""
