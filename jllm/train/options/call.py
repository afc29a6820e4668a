"""Options of the trainer: what this command is to do."""

import dataclasses
from pathlib import Path

from jllm.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallOptions:
    """What this command is to do."""

    dry_run: bool = option(
        False,
        group="This command",
        help="print what differs from the defaults, stages, steps, estimates and warnings, and end without training",
    )
    json: bool = option(False, help="with --dry_run: print everything, all options too, as one JSON object")
    config: Path | None = option(
        None, may_differ=True, help="TOML file of options, such as the config.toml in a run's log folder; flags win"
    )
    local_rank: int = option(-1, least=-1, may_differ=True, help="set by the launcher", hidden=True)
