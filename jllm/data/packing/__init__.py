"""Documents to rows.

Stacked or in windows (`packers`), whole in few rows (`best_fit`), conversations (`conversations`).

Imports `dataset` and the ground."""
