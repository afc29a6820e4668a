"""`python -m jllm.shuffle_partition`: the command is `jllm.commands.shuffle_partition`."""

from jllm.commands.shuffle_partition import main

if __name__ == "__main__":
    main()
