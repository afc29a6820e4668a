"""`python -m jllm.plot`: the command is `jllm.commands.plot`."""

from jllm.commands.plot import main

if __name__ == "__main__":
    main()
