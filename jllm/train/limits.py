"""The largest values that the trainer's options may have: far more than anybody needs, and not beyond what adds up."""

MOST_STEPS = 10**8
"""More than any run makes: at ten steps a second they take four months."""
MOST_ROWS = 1 << 32
"""More rows, or tokens, than a micro-batch or step has."""
MOST_RATE = 1e30
"""Far more than any learning rate or weight of a loss is; its square is still no infinity in 64 bits."""
MOST_SECONDS = 10**8
"""Three years."""
MOST_WEIGHT = 10_000
"""How often an epoch may have a row; more is what `--num_train_epochs` is for."""
