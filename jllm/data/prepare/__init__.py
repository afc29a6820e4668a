"""The raw2ids run: options (`config`, `recipes`), plan (`run`, `restart`), the output folder (`outputs`, `workplace`),
and the loop over chunks (`conversion`) with what encodes, keeps, deals and writes them (`encoding`, `chunk_cache`,
`holdout`, `sink`).

Imports every other package of `jllm.data`, but for `shuffle`."""
