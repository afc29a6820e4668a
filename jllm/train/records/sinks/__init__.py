"""Where the numbers of a run go beside `metrics.jsonl`: TensorBoard, and services, each through its own package.

Nothing here is imported before it is asked for. Imports the package's file helpers and errors only.
"""
