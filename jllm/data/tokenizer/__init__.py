"""What a tokenizer is, the engines that turn text to ids, and the proof that they agree.

What it is: `facts`; engines: `engines`, of which `checked_engine` opens and checks the one that a command uses.

Imports `dataset` and the ground."""
