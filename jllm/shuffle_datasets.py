"""`python -m jllm.shuffle_datasets`: the command is `jllm.commands.shuffle_datasets`."""

from jllm.commands.shuffle_datasets import main

if __name__ == "__main__":
    main()
