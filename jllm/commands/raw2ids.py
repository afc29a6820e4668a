"""`python -m jllm.raw2ids`: text and chat files to token-id shards."""

import os
from typing import TYPE_CHECKING

from jllm.data.prepare.config import Raw2IdsConfig
from jllm.machine import collect_rarely, leave_at_once
from jllm.options import command

if TYPE_CHECKING:
    from jllm.data.tokenizer.early import EarlyEngines


@command(Raw2IdsConfig, name="raw2ids")
def main(config: Raw2IdsConfig) -> None:
    """Turn text and chat files into token-id shards.

    The result depends on the input, the tokenizer and the options alone, not on --cores. A killed run is finished by
    running it again; a finished one is left as it is.
    """
    # No matrix is multiplied here, and numpy's threads for that cost every process of the run 0.1 s to start.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    collect_rarely()
    if config.dry_run:
        from jllm.data.prepare.dry_run import dry_run

        dry_run(config)
        return
    begun = _begun_at_once(config)
    from jllm.data.prepare.run import prepare

    prepare(config, begun)


def _begun_at_once(config: Raw2IdsConfig) -> "EarlyEngines | None":
    """Engines for a new data set, built while all else is imported; none where the run may need none of them."""
    is_new = config.clean or (config.output is not None and not config.output.exists())
    if config.engine == "hf" or not is_new or not all(map(os.path.exists, config.input)):
        return None
    from jllm.data.tokenizer.early import begun_at_once

    return begun_at_once(config.tokenizer, inert=config.is_chat)


def run() -> None:
    """The whole process of `python -m jllm.raw2ids`: it leaves as soon as its work is done."""
    try:
        main()
    except SystemExit as end:  # a mistake need not wait until an engine is built
        leave_at_once(end.code if isinstance(end.code, int) else 0)
    leave_at_once()
