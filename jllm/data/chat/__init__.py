"""Chat records to ids and labels.

Formats → messages (`formats`), rendered by a template to segments (`rendering`, `short_cut`, in processes of their own:
`rendered`), and those to ids and labels (`assembler`).

Imports `sources`, `tokenizer`, `packing`, `dataset` and the ground."""
