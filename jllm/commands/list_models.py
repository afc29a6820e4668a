"""`jllm models`: which model families work in a pipeline, which are refused and why, and how that was shown."""

import dataclasses

from jllm.errors import say
from jllm.options import command


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """No options."""


@command(ModelsConfig, name="models")
def main(config: ModelsConfig) -> None:
    """List the causal language models of transformers and whether they train in a pipeline."""
    from jllm.models.families import catalogue_table

    say(catalogue_table())
