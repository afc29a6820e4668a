"""Bytes to records with file and line.

Which files an input names (`inputs`), their bytes (`streams`), cut into chunks (`chunks`), and the records of a chunk
(`parsing`). Each format has a file: `text`, `json_lines`, `json_list`, `parquet`.

Imports the ground alone."""
