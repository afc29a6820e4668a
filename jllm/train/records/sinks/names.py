"""Which services a run may report to, and whether their packages are there; nothing is imported for that."""

import importlib.util

from jllm.errors import UserError, did_you_mean

SERVICES = ("mlflow", "trackio", "wandb")
"""Each is the name of its package too."""


def services_of(given: str) -> list[str]:
    """`--report_to` taken apart.

    Raises:
        UserError: a service that is not known, or whose package is not installed.
    """
    names = list(dict.fromkeys(part.strip() for part in given.split(",") if part.strip()))
    for name in names:
        if name not in SERVICES:
            raise UserError(
                f'--report_to "{given}": {name} is none of {", ".join(SERVICES)};'
                f" TensorBoard gets everything anyway.{did_you_mean(name, SERVICES)}"
            )
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f'--report_to {name}: the package {name} is not installed; install it (pip install "jllm[report]") or'
                " leave it out"
            )
    return names
