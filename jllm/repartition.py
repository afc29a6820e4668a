"""`python -m jllm.repartition`: the command is `jllm.commands.repartition`."""

from jllm.commands.repartition import main

if __name__ == "__main__":
    main()
