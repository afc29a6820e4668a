"""`deepspeed --module jllm.train_pipe`: the command is `jllm.commands.train_pipe`."""

from jllm.commands.train_pipe import main

if __name__ == "__main__":
    main(prog_name="python -m jllm.train_pipe")
