"""jllm: raw text and chat logs to token-id shards, a global shuffle, and a pipeline-parallel trainer."""

__version__ = "0.1.0"
