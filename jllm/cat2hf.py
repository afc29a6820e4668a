"""`python -m jllm.cat2hf`: the command is `jllm.commands.cat2hf`."""

from jllm.commands.cat2hf import main

if __name__ == "__main__":
    main()
