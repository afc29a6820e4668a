"""`python -m jllm.manifest`: the command is `jllm.commands.manifest`."""

from jllm.commands.manifest import main

if __name__ == "__main__":
    main()
