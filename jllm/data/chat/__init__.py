"""Chat records to ids and labels: formats, templates, rendered segments.

Imports `sources`, `tokenizer`, `packing`, `dataset` and the ground."""
