"""The tokens of rows shared by several ranks: which a stage has, and attention over those that it has not.

Whatever a family does to tokens one by one needs no code here; what it does between them is attention, which it calls
by name. What passes between the ranks is in `jllm.parallel.sequence`.
"""
