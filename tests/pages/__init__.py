"""The pages, and the lines that people have in their scripts: what they say is so."""
