"""Weights: model folders, loading, saving, random initialisation."""
