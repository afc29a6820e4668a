"""The faces of the commands, one file each: options in, one call, a report out.

A command's module imports `jllm.options`, the ground, and the class of its options; the package that does the work is
imported when the command runs, so that `--help` is instant. Nothing imports a command but `jllm.cli` and the two-line
modules that people call by name (`python -m jllm.raw2ids`).
"""
