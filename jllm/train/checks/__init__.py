"""What the start refuses: what a run would die of later, found by the same functions in a dry run and a run."""
