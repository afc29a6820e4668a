"""What a run of raw2ids saves: encoded chunks, data sets, and where it goes on. Imports as that package does."""
