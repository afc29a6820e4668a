"""The data stages: raw text and chats to token-id shards, shuffled and dealt to partitions.

`sources` reads records, `chat` renders conversations, `tokenizer` makes ids, `packing` rows, `dataset` is the contract
on disk; `prepare` is the raw2ids run over all of these, and `shuffle` rearranges data sets. `recipes` is the interface
for Python, `spark` what the Spark jobs share. Imports the ground alone: never torch, models, the trainer or commands.
"""
