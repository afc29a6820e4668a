"""Optimizers and learning-rate schedules.

Imports torch and the run's options only.
"""
