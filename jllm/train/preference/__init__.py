"""What a run with a loss of preference pairs has beside its objective: references, records, warnings.

May import what `jllm.train` may; the objective itself is `jllm.train.objectives.preference`.
"""
