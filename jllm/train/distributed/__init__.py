"""The processes of a run: launch, agreement, the DeepSpeed engine.

Imports `jllm.parallel` for who is where, `jllm.models.pipeline` for what an engine runs. DeepSpeed is imported here and
where its device is asked for, and nowhere else.
"""
