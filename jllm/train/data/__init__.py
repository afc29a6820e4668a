"""Shards to steps of micro-batches: opening, order, rows, batching, loading, collation."""
