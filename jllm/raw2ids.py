"""`python -m jllm.raw2ids`: the command is `jllm.commands.raw2ids`."""

from jllm.commands.raw2ids import main, run
from jllm.data.prepare.config import Raw2IdsConfig

__all__ = ["Raw2IdsConfig", "main"]

if __name__ == "__main__":
    run()
