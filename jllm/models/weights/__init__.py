"""Weights: model folders, loading, saving, random initialisation.

Imports `jllm.models.pipeline` for what a stage owns, and `jllm.models.legacy` for older published layouts.
"""
