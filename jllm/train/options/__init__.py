"""The options of the trainer, a file for each group of them in `--help`; `jllm.train.config` puts them together."""
