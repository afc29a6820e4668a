"""The processes of a run: launch, agreement, the DeepSpeed engine."""
