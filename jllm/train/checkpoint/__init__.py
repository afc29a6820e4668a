"""Checkpoints: format, state by name, saving, resuming, export."""
