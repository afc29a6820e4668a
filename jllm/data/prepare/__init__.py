"""The raw2ids run: options, plan, the loop over chunks, output folder, progress.

Options: `config`, `recipes`; plan: `run`, `restart`; the output folder: `outputs`, `workplace`; the loop: `conversion`,
with what encodes, keeps, deals and writes chunks (`encoding`, `chunk_cache`, `holdout`, `sink`).

Imports every other package of `jllm.data`, but for `shuffle`."""
