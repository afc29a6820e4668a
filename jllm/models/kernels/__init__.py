"""Attention kernels: which of them a machine has, and one of our own for packed rows on CUDA."""
