"""What is trained beside a frozen model. Imports what `jllm.models` may import, and peft."""
