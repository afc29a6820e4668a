"""Documents to rows.

Imports `dataset` and the ground."""
