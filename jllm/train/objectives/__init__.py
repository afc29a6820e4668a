"""What the last stage computes."""
