"""Readers against files that were changed at random: `python -m tests.security.fuzz`."""
