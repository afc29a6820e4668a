"""`python -m jllm` is `jllm`."""

from jllm.cli import main

main(prog_name="jllm")
