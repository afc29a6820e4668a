"""Checkpoints whose code transformers no longer carries, read into the nearest class that it does carry."""
