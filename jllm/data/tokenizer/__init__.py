"""What a tokenizer is, the engines that turn text to ids, and the proof that they agree.

Imports `dataset` and the ground."""
