"""The raw2ids run: plan, workers, output folder, progress.

Imports every other package of `jllm.data`."""
