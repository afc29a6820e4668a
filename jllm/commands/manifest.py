"""`jllm manifest FOLDER`: make the manifest of a folder of shards, or check the one it has."""

import dataclasses
from pathlib import Path

from jllm.errors import UserError, say
from jllm.options import command, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManifestConfig:
    """Options of `manifest`."""

    folder: Path = option(dataclasses.MISSING, help="folder of shards", positional=True)
    tokenizer: str | None = option(None, help="the tokenizer that made the ids, to record it", metavar="FOLDER")
    cores: int = option(-1, help="workers; negative: all cores")
    verify: bool = option(False, help="check every file against the manifest instead of making one")


@command(ManifestConfig, name="manifest")
def main(config: ManifestConfig) -> None:
    """Describe the shards below FOLDER, whoever wrote them: count, hash every file, and write _manifest.json.

    With --verify, read every file and compare it with the manifest instead.
    """
    from jllm.data.dataset.describe import describe, warnings_about
    from jllm.data.dataset.manifest import open_data_set, verify
    from jllm.machine import usable_cores

    if config.verify:
        problems = verify(open_data_set(config.folder))
        if problems:
            raise UserError(f"{problems[0]} ({len(problems)} files in all); restore them, or make the data set again")
        print(f"{config.folder}: every file matches its checksum")
        return
    tokenizer = None
    if config.tokenizer:
        from jllm.data.tokenizer.facts import load_tokenizer

        tokenizer = load_tokenizer(config.tokenizer).for_manifest
    manifest = describe(config.folder, cores=usable_cores(config.cores), tokenizer=tokenizer)
    for name, kind in manifest.further.types.items():
        say(f"column {name}: {kind}")
    for line in manifest.further.warnings():
        say(f"when rows are rewritten, {line}")
    for warning in warnings_about(config.folder):
        say(f"warning: {warning}")
    print(
        f"{config.folder}: {manifest.rows:,} rows, {manifest.total('tokens'):,} tokens,"
        f" {manifest.total('trained_tokens'):,} trained, in {len(manifest.files)} files"
    )
