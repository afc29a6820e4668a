"""A stage in slices on several ranks: how its model is cut, and how its weights are written."""
