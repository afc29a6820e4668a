"""What a tokenizer is (`facts`), the engines that turn text to ids (`engines`), and the proof that they agree
(`checked_engine`).

Imports `dataset` and the ground."""
