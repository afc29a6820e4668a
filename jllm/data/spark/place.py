"""The output folder of a Spark job: whose it is, how a killed job is gone on with, and what is removed.

While a job is unfinished its folder holds a work folder: `run.json` says what is being made, `claim` who makes it,
`data-*` is where Spark writes. What is finished there is described in `manifest.json`, and then moved file by file to
names that depend on nothing but the partition: a job that was killed in between only moves the rest.

Guarantees: nothing is removed but what a manifest of the same job names and what lies in the work folder. A job that
ends with a mistake leaves what was there before it.
"""

import contextlib
import dataclasses
import json
import re
import secrets
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from jllm import atomic
from jllm.data.dataset.files import file_name
from jllm.data.dataset.manifest import MANIFEST_NAME, Manifest
from jllm.data.spark import claim
from jllm.data.spark.files import HadoopFiles, is_link, is_local, joined, local_path
from jllm.data.spark.footers import settle
from jllm.errors import UserError
from jllm.guards import notation
from jllm.guards.typed import MALFORMED

RUN, CLAIM, PENDING, SUCCESS = "run.json", "claim", "manifest.json", "_SUCCESS"
_OF_SPARK = re.compile(r"part-(\d+)-.*-c(\d+)\.")


class JobPlace:
    """See the module.

    Args:
        files: of the session.
        shown: the folder as it was given.
        work: name of the work folder.
        command: of the job, as manifests have it.
    """

    def __init__(self, files: HadoopFiles, shown: str, *, work: str, command: str) -> None:
        self.files = files
        self.shown = shown
        self.folder = files.qualified(shown)
        self.command = command
        self.work = joined(self.folder, work)
        self._begun_here = False

    @contextlib.contextmanager
    def held(self, driver: claim.DriverProcess = claim.ALONE) -> Iterator[None]:
        """Keep other jobs out while the block runs; a mistake in it leaves nothing of this job.

        Raises:
            UserError: another job works there, or it is no folder that can be written to.
        """
        if is_link(self.work):
            name = self.work.rpartition("/")[2]
            raise UserError(f"-o {self.shown}: {name} in it is a link, which is not written through; remove it")
        made = self._missing()
        try:
            self.files.make_folder(self.work)
            holding = claim.held(self.files, joined(self.work, CLAIM), self.shown, driver=driver)
            holding.__enter__()
        except UserError as error:
            self._take_away(made)
            if str(error).startswith("-o "):
                raise
            raise UserError(f"-o {self.shown}: cannot be written to ({error}); give another folder") from None
        keep = self._is_begun
        try:
            yield
            keep = False
        except UserError:
            if self._begun_here:  # what is left of it can only be moved on
                keep = self.files.exists(joined(self.work, PENDING))
            raise
        except BaseException:
            keep = True
            raise
        finally:
            holding.__exit__(None, None, None)
            self.files.remove(joined(self.work, CLAIM) if keep else self.work)
            self._take_away(made)

    def _missing(self) -> list[str]:
        """The folders that must be made for this one, innermost first."""
        made, folder = [], self.folder
        while folder.count("/") > 1 and not self.files.exists(folder):
            made.append(folder)
            folder = folder.rsplit("/", 1)[0]
        return made

    def _take_away(self, made: list[str]) -> None:
        for folder in made:
            with contextlib.suppress(UserError):
                if not self.files.remove_if_empty(folder):
                    return

    # What is there.

    @property
    def _is_begun(self) -> bool:
        """Whether a killed job, or this one, left something to go on with."""
        return any(self.files.exists(joined(self.work, name)) for name in (RUN, PENDING))

    def manifest(self) -> Manifest | None:
        """Of the data set that is finished there.

        Raises:
            UserError: it cannot be read.
        """
        return self._manifest_at(joined(self.folder, MANIFEST_NAME))

    def begun(self, keys: Collection[str] = ()) -> dict[str, Any] | None:
        """What a killed job recorded with `begin`; None where it is not all of these."""
        path = joined(self.work, RUN)
        with contextlib.suppress(ValueError):  # what was damaged says nothing
            value = notation.loads(self.files.read(path)) if self.files.exists(path) else None
            return value if isinstance(value, dict) and set(keys) <= value.keys() else None
        return None

    def pending(self) -> Manifest | None:
        """Of what is written, and perhaps in part moved."""
        with contextlib.suppress(UserError):
            return self._manifest_at(joined(self.work, PENDING))
        return None

    def _manifest_at(self, path: str) -> Manifest | None:
        if not self.files.exists(path):
            return None
        try:
            value = notation.loads(self.files.read(path))
            if not isinstance(value, dict):
                raise ValueError(f"a JSON {type(value).__name__} and no object")
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}); remove it, or give another -o") from None
        return Manifest.from_json(value, Path(path))

    @property
    def finished_at(self) -> int:
        """When the manifest was written, in nanoseconds; 0 where there is none."""
        status = self.files.status(joined(self.folder, MANIFEST_NAME))
        return 0 if status is None else (status.modified + 1) * 1_000_000

    def shards(self) -> list[str]:
        """Parquet files there, below the folder; those in folders that readers pass over are not."""
        found: list[str] = []
        pending = [self.folder]
        while pending:
            for one in self.files.inside(pending.pop()):
                name = one.path.rsplit("/", 1)[-1]
                if name == "_temporary":
                    raise UserError(
                        f"-o {self.shown}: holds _temporary, which another Spark job is writing or left when it died;"
                        " remove it, or give another -o"
                    )
                if name[0] in "_.":
                    continue
                if one.is_folder:
                    pending.append(one.path)
                elif name.endswith(".parquet"):
                    found.append(one.path)
        return sorted(found)

    def is_empty(self) -> bool:
        """Whether nothing but the work folder is there."""
        return all(one.path == self.work for one in self.files.inside(self.folder))

    def changed(self, manifest: Manifest) -> str | None:
        """A file that is not what the manifest says, by size and footer."""
        for entry in manifest.files:
            path = joined(self.folder, entry.path)
            status = self.files.status(path)
            if status is None or status.size != entry.bytes or self.files.footer_of(path, status.size) != entry.footer:
                return entry.path
        return None

    # What is done.

    def begin(self, record: dict[str, Any]) -> str:
        """Say what is being made, drop what a killed job had not finished, and return where Spark writes."""
        for one in self.files.inside(self.work):
            if one.path.rsplit("/", 1)[-1] != CLAIM:
                self.files.remove(one.path)
        self._begun_here = True
        self.files.write(joined(self.work, RUN), json.dumps(record))
        return joined(self.work, f"data-{secrets.token_hex(4)}")

    def settle(self, staged: str) -> None:
        """Make the bytes of what Spark wrote depend on its rows alone, where files can be changed in place."""
        if not is_local(staged):
            return
        for path in Path(local_path(staged)).glob("part-*.parquet"):
            settle(path)
            path.with_name(f".{path.name}.crc").unlink(missing_ok=True)  # which Spark would find wrong

    def finish(self, staged: str, manifest: Manifest, codec: str) -> Manifest:
        """Make what Spark wrote to `staged`, which `manifest` describes, the data set; with the files' final names."""
        written = [entry for entry in manifest.files if entry.rows]  # the first partition has a file without rows too
        names = {entry.path: final_name(entry.path, codec) for entry in written}
        entries = [dataclasses.replace(entry, path=names[entry.path]) for entry in written]
        final = dataclasses.replace(manifest, files=tuple(sorted(entries, key=lambda each: each.path)))
        record = {"staged": staged, "names": {name: old for old, name in names.items()}}
        self.files.write(joined(self.work, "moves.json"), json.dumps(record))
        self.files.write(joined(self.work, PENDING), json.dumps(final.to_json()))
        self.move(final)
        return final

    def _moves(self, final: Manifest) -> tuple[str, dict[str, str]]:
        """Where the files lie, and under which names.

        Raises:
            UserError: they lie elsewhere than in the work folder, or not all have a name.
        """
        path = joined(self.work, "moves.json")
        try:
            moves = notation.loads(self.files.read(path))
            staged, names = moves["staged"], {entry.path: moves["names"][entry.path] for entry in final.files}
            within = staged.removeprefix(self.work.rstrip("/") + "/")
            problems = [atomic.plain_name(name) for name in (*names.values(), within)]
            if within == staged or (problem := next(filter(None, problems), None)):
                raise ValueError(problem if within != staged else f"{staged!r} lies elsewhere")
        except MALFORMED as error:
            raise UserError(f"{path}: not what a job left there ({error}); start over with --clean") from None
        return staged, names

    def move(self, final: Manifest) -> None:
        """Give the files of `pending` their names, those that have them not yet, and then write the manifest."""
        staged, names = self._moves(final)
        for entry in final.files:
            source, target = joined(staged, names[entry.path]), joined(self.folder, entry.path)
            if self.files.exists(source):
                self.files.remove(target)  # half a copy, where a rename is one
                self.files.rename(source, target)
            elif not self.files.exists(target):
                self.files.remove(joined(self.work, PENDING))
                raise UserError(f"-o {self.shown}: {entry.path} is gone; run the same command again")
        self.files.write(joined(self.folder, SUCCESS), "")
        self.files.write(
            joined(self.folder, MANIFEST_NAME), json.dumps(final.to_json(), indent=1, ensure_ascii=False) + "\n"
        )

    def clean(self) -> bool:
        """Remove what this job made there, finished or not; whether there was any.

        Raises:
            UserError: what is there was made by another command.
        """
        manifest = self.manifest()
        if manifest is not None and manifest.command != self.command:
            raise UserError(
                f"-o {self.shown}: holds the result of {manifest.command}; --clean removes only what {self.command}"
                " made; give another -o"
            )
        known = [each for each in (manifest, self.pending()) if each is not None]
        if not known and not self._is_begun:
            return False
        if is_link(self.folder):
            raise UserError(f"-o {self.shown}: is a link, and nothing is removed through one; name the folder itself")
        # First the manifest goes, and what there is to remove is remembered: a kill does no harm.
        entries = {entry.path: entry for each in known for entry in each.files}
        if manifest is not None:
            self.files.write(joined(self.work, PENDING), json.dumps(manifest.to_json()))
            self.files.remove(joined(self.folder, MANIFEST_NAME))
        for path in entries:
            self.files.remove(joined(self.folder, path))
            folder, _, name = joined(self.folder, path).rpartition("/")
            self.files.remove(joined(folder, f".{name}.crc"))  # of an earlier version
        if known:
            self.files.remove(joined(self.folder, SUCCESS))
            self.files.remove(joined(self.folder, f".{SUCCESS}.crc"))
        for one in self.files.inside(self.work):
            if one.path.rsplit("/", 1)[-1] != CLAIM:
                self.files.remove(one.path)
        return True


def final_name(path: str, codec: str) -> str:
    """The name of a file in the data set: Spark's without the random part."""
    found = _OF_SPARK.match(path.rsplit("/", 1)[-1])
    assert found is not None, path
    part = int(found[1])
    if int(found[2]):
        return file_name(f"part-{part:05d}", int(found[2]), codec)
    return file_name("part", part, codec)
