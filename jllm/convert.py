"""`python -m jllm.convert`: the command is `jllm.commands.convert`."""

from jllm.commands.convert import main

if __name__ == "__main__":
    main()
