"""`jllm manifest FOLDER`: make the manifest of a folder of shards, or check the one it has."""

import dataclasses
from pathlib import Path

from jllm.errors import UserError, say
from jllm.options import command, option
from jllm.ranges import LEAST_INT


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManifestConfig:
    """Options of `manifest`."""

    folder: Path = option(dataclasses.MISSING, help="folder of shards", positional=True)
    tokenizer: str | None = option(None, help="the tokenizer that made the ids, to record it", metavar="FOLDER")
    cores: int = option(-1, least=LEAST_INT, help="workers; negative: all cores")
    verify: bool = option(False, help="check every file against the manifest instead of making one")
    force: bool = option(False, help="replace the manifest that is there")

    def __post_init__(self) -> None:
        if self.verify and (self.tokenizer is not None or self.force):
            raise UserError("--verify writes nothing; leave out --tokenizer and --force")


@command(ManifestConfig, name="manifest")
def main(config: ManifestConfig) -> None:
    """Describe the shards below FOLDER, whoever wrote them: count, hash every file, and write _manifest.json.

    A manifest that is there is replaced with --force only; --tokenizer adds what it lacks of a tokenizer's facts. With
    --verify, read every file and compare it with the manifest instead.
    """
    from jllm.data.dataset.describe import describe, verify_folder, warnings_about
    from jllm.machine import usable_cores

    if config.verify:
        verified = verify_folder(config.folder, cores=usable_cores(config.cores))
        say(f"{config.folder}: {len(verified.paths)} files, and every one matches its checksum")
        return
    tokenizer, special_ids = None, frozenset[int]()
    if config.tokenizer:
        from jllm.data.tokenizer.facts import load_tokenizer

        facts = load_tokenizer(config.tokenizer)
        tokenizer, special_ids = facts.for_manifest, facts.special_ids
    manifest = describe(
        config.folder,
        cores=usable_cores(config.cores),
        tokenizer=tokenizer,
        special_ids=special_ids,
        force=config.force,
    )
    for name, kind in manifest.further.types.items():
        say(f"column {name}: {kind}")
    for line in manifest.further.warnings():
        say(f"when rows are rewritten, {line}")
    for warning in warnings_about(config.folder):
        say(f"warning: {warning}")
    say(
        f"{config.folder}: {manifest.rows:,} rows, {manifest.total('tokens'):,} tokens,"
        f" {manifest.total('trained_tokens'):,} trained, in {len(manifest.files)} files; largest id"
        f" {manifest.largest_id}, labels checked"
    )
