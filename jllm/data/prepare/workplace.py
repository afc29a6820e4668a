"""The output folder of a run: whose it is, whether it may be gone on with, and how to start over.

While a run is unfinished its folder holds `.raw2ids/`: `run.json` says what is being made (options, tokenizer,
sources), beside it lie unfinished files, encoded chunks and the state. A finished folder holds shards and the
manifest only.

Guarantees: a run never mixes with files made with other options, another tokenizer, template, version of the rules or
other sources, never with files it did not make, and never with a second run at the same time. Only a source that could
not be read may have been changed when the run goes on. `clean` removes nothing that this tool did not write.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from jllm import atomic
from jllm.data.dataset.files import footer_of
from jllm.data.dataset.manifest import MANIFEST_NAME, Manifest, read_manifest
from jllm.data.dataset.shards import CODECS, list_shards
from jllm.data.sources.identity import is_same, is_same_since
from jllm.errors import UserError
from jllm.guards import notation
from jllm.guards.typed import MALFORMED

WORK_NAME, BAD_RECORDS = ".raw2ids", "bad records"
_UNREADABLE = "unreadable source"
START_OVER = "start over with -C, or give another -o"


class Workplace:
    """See the module.

    Args:
        folder: the data set's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / WORK_NAME
        self._lock: IO[str] | None = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; created where it is missing.

        An error before anything was made leaves nothing behind.

        Raises:
            UserError: another run holds it, or the place is not a folder that can be written to.
        """
        made: list[Path] = []
        try:
            made += [folder for folder in (self.work, self.folder, *self.folder.parents) if not folder.exists()]
            self.work.mkdir(parents=True, exist_ok=True)
            if self.work.is_symlink():
                raise UserError(
                    f"-o {self.folder}: {WORK_NAME} in it is a link, which is not written through; remove it"
                )
            self._lock = os.fdopen(atomic.open_in_place(self.work / "lock", os.O_WRONLY | os.O_CREAT), "w")
        except OSError as error:
            with contextlib.suppress(OSError):
                self._remove(made)
            reason = f"{error.filename or self.folder}: {error.strerror}"
            raise UserError(f"-o {self.folder}: cannot be written to ({reason}); give another folder") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"-o {self.folder}: another run is writing there; wait for it, or give another -o"
            ) from None
        try:
            yield
        except BaseException:
            self._leave_nothing(made)
            raise
        finally:
            self._lock.close()

    def _leave_nothing(self, made: list[Path]) -> None:
        """Remove the work folder of a run that made nothing, and the folders made for it, innermost first."""
        left = list(self.work.glob("*"))
        if {path.name for path in left} <= {"lock", "run.json", BAD_RECORDS}:
            for path in left:
                with contextlib.suppress(OSError):  # of that name, and not ours
                    path.unlink()
            with contextlib.suppress(OSError):
                self.work.rmdir()
        with contextlib.suppress(OSError):
            self._remove(made)

    def _remove(self, made: list[Path]) -> None:
        for folder in made:
            if folder != self.work:
                folder.rmdir()

    def clean(self) -> None:
        """Remove what an earlier run left: shards by its naming scheme or its manifest, the manifest, the work
        folder."""
        if self.folder.is_symlink() and (self.holds_a_data_set or list_shards(self.folder)):
            raise UserError(f"-o {self.folder}: is a link, and nothing is removed through one; name the folder itself")
        stems = self._stems()
        codecs = "|".join(CODECS)
        for path in list_shards(self.folder):
            split = path.parent.name
            ours = (
                path.parent.parent == self.folder
                and atomic.is_inside(path, self.folder)
                and re.fullmatch(rf"({'|'.join(map(re.escape, stems)) or '(?!)'})-\d{{5,}}", split)
            )
            if ours and re.fullmatch(rf"{re.escape(split)}-\d{{5,}}\.({codecs})\.parquet", path.name):
                path.unlink()
                with contextlib.suppress(OSError):
                    path.parent.rmdir()
        (self.folder / MANIFEST_NAME).unlink(missing_ok=True)
        for path in self.work.iterdir():
            if path.name != "lock":
                atomic.remove_tree(path)

    def _stems(self) -> set[str]:
        identity = self._identity() or {}
        stems = {source["stem"] for source in identity.get("sources", ())}
        with contextlib.suppress(UserError):
            manifest = read_manifest(self.folder)
            for entry in manifest.files if manifest else ():
                stems.add(entry.path.split("/")[0].rsplit("-", 1)[0])
        return stems

    def _identity(self) -> dict[str, Any] | None:
        with contextlib.suppress(UserError):  # what was damaged says nothing
            value = atomic.read_object(self.work / "run.json", START_OVER)
            if value is not None and {"options", "tokenizer", "sources"} <= value.keys():
                return value
        return None

    def earlier_options(self) -> dict[str, Any]:
        """The recorded options of the run, finished or not, that wrote into this folder."""
        options: dict[str, Any] = (self._identity() or {}).get("options") or {}
        with contextlib.suppress(UserError):
            manifest = read_manifest(self.folder)
            options = manifest.options if manifest else options
        return options

    def begin_afresh(self, identity: dict[str, Any]) -> None:
        """Drop what an unfinished run made; what it made it of is not to be had again."""
        self.clean()
        self.remember(identity)

    @property
    def holds_a_data_set(self) -> bool:
        """Whether some run was finished here, and nothing is left to do or may be done."""
        return (self.folder / MANIFEST_NAME).is_file()

    def finished(self, identity: dict[str, Any]) -> Manifest | None:
        """The manifest of a run that is finished and is this very run; None where there is work to do.

        Raises:
            UserError: the folder holds something else.
        """
        manifest = read_manifest(self.folder)
        wanted = json.loads(json.dumps(identity))
        if manifest is not None:
            compare(self.folder, wanted, as_finished(manifest))
            made_at = (self.folder / MANIFEST_NAME).stat().st_mtime_ns
            refuse_sources(
                self.folder, wanted["sources"], manifest.sources, lambda now, then: is_same_since(now, then, made_at)
            )
            for entry in manifest.files:
                path = self.folder / entry.path
                if not path.is_file() or path.stat().st_size != entry.bytes or footer_of(path) != entry.footer:
                    raise not_as_made(self.folder, entry.path)
            return manifest
        earlier = self._identity()
        if earlier is not None:
            compare(self.folder, wanted, earlier)
            earlier["sources"] = self._with_what_was_mended(wanted["sources"], earlier["sources"])
            refuse_sources(self.folder, wanted["sources"], earlier["sources"], is_same)
            atomic.write_json(self.work / "run.json", {**wanted, "sources": earlier["sources"]})
        elif list_shards(self.folder):
            raise not_ours(self.folder)
        else:
            atomic.write_json(self.work / "run.json", identity)
        return None

    def note_unreadable(self, source: int) -> None:
        """Remember that a source could not be read: it may be another one the next time."""
        self.note(_UNREADABLE, str(source))

    def _with_what_was_mended(
        self, sources: list[dict[str, Any]], before: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The sources of an unfinished run, with the one that could not be read as it is now. What was made of it is
        dropped, and where it cannot be told apart, all."""
        noted = self.noted(_UNREADABLE)
        if noted is None or [item["name"] for item in sources] != [item["name"] for item in before]:
            return before
        if not noted.isdecimal() or len(noted) > 9 or int(noted) >= len(sources):
            self.clean()
            return sources
        number = int(noted)
        if is_same(sources[number], before[number]):
            return before
        paths = list(self.work.glob("state-*.json"))
        try:
            points = [notation.read_json(path)["checkpoint"] for path in paths]
            goes_beyond = any((point["source"], point["block"]) > (number, 0) for point in points)
        except MALFORMED:
            goes_beyond = True
        if goes_beyond:
            self.clean()
        else:
            for path in self.work.glob(f"block-{number:05d}-*"):
                path.unlink()
            (self.work / f"note {_UNREADABLE}").unlink()
        return [*before[:number], sources[number], *before[number + 1 :]]

    def date_of_earlier_run(self) -> str | None:
        """The date that the unfinished run in this folder gave to its template."""
        return (self._identity() or {}).get("date") or None

    def note(self, what: str, why: str) -> None:
        """Leave a note for later runs in this folder; it stays until the run is finished."""
        atomic.write_text(self.work / f"note {what}", why)

    def noted(self, what: str) -> str | None:
        """What `note` left."""
        path = self.work / f"note {what}"
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def remember(self, identity: dict[str, Any]) -> None:
        """Replace what the run is making, in a folder that was just cleaned."""
        atomic.write_json(self.work / "run.json", identity)

    def close(self) -> None:
        """Remove the work folder of a finished run."""
        shutil.rmtree(self.work, ignore_errors=True)

    def discard_temporaries(self) -> None:
        """Remove the half-written files of a killed run."""
        for path in self.work.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def as_finished(manifest: Manifest) -> dict[str, Any]:
    """What a manifest says was made, for `compare`."""
    chat = manifest.extra.get("chat") or {}
    return {
        "options": manifest.options,
        "rules": manifest.extra.get("rules"),
        "template": [chat.get(key) for key in ("template_sha256", "tools_template_sha256")] if chat else None,
        "tokenizer": manifest.tokenizer.sha256 if manifest.tokenizer else None,
    }


def compare(folder: object, wanted: dict[str, Any], made: dict[str, Any]) -> None:
    """Raises:
    UserError: what a run in `folder` made, or makes, is not what is wanted; both as plain data.
    """
    for key in {**made["options"], **wanted["options"]}:
        before, now = made["options"].get(key), wanted["options"].get(key)
        if before != now:
            raise UserError(f"-o {folder}: was made with {key} = {before!r}, now it is {now!r}; {START_OVER}")
    if made["tokenizer"] != wanted["tokenizer"]:
        raise UserError(f"-o {folder}: was made with another tokenizer; {START_OVER}")
    if made.get("rules") != wanted.get("rules"):
        raise UserError(
            f"-o {folder}: was begun by another version of this command, whose rules are not the same; {START_OVER}"
        )
    if made.get("template") != wanted.get("template"):
        raise UserError(f"-o {folder}: the chat template was changed since it was begun; {START_OVER}")


def refuse_sources(
    folder: object,
    sources: Sequence[dict[str, Any]],
    made: Sequence[dict[str, Any]],
    is_same: Callable[[dict[str, Any], dict[str, Any]], bool],
) -> None:
    """Raises:
    UserError: the sources are not those that something was made of.
    """
    names, before = ([item["name"] for item in items] for items in (sources, made))
    if names != before:
        differing = [name for name in names if name not in before] + [name for name in before if name not in names]
    else:
        differing = [now["name"] for now, then in zip(sources, made, strict=True) if not is_same(now, then)]
    if names != before or differing:
        raise UserError(f"-o {folder}: the input changed ({(differing or names)[0]}); {START_OVER}")


def not_ours(folder: object) -> UserError:
    return UserError(f"-o {folder}: holds Parquet files that this command did not write; give another folder")


def not_as_made(folder: object, path: str) -> UserError:
    return UserError(f"-o {folder}: {path} is missing or changed; {START_OVER}")
