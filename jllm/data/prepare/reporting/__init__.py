"""What a run of raw2ids says of itself: bad records, counts, progress. Imports what `jllm.data.prepare` does."""
