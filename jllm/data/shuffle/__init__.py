"""Permutation, passes, mixing and repartition of data sets.

Imports `dataset` and the ground."""
