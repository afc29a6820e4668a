"""`python -m jllm.inspect`: the command is `jllm.commands.inspect`."""

from jllm.commands.inspect import main

if __name__ == "__main__":
    main()
