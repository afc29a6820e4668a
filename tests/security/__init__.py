"""Folders, files and names that somebody hostile made: none of them runs, writes, reads or shows what it should not."""
