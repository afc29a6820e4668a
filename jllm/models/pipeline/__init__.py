"""A model in stages: spans, stages, the structure of a family, the head, partition, costs, measured times.

`span`, `stand_ins`, `structure`, `bundle` and `head` need nothing else of the package but errors; `carving` cuts a
model with them, and `stage` runs what is left. Costs and partition need models without memory only.
"""
