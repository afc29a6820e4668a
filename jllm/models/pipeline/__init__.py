"""A model in stages: spans, stages, the structure of a family, partition, costs, measured times."""
