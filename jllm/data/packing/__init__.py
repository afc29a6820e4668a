"""Documents to rows: stacked or in windows (`packers`), whole in few rows (`best_fit`), conversations
(`conversations`).

Imports `dataset` and the ground."""
