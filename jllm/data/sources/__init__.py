"""Bytes to records with file and line: inputs, decompression, blocks of lines, JSON lists, Parquet.

Imports the ground alone."""
