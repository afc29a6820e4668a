"""Small files and folders on any file system that Spark knows, through Hadoop.

Guarantees: what a file system refuses is a `UserError` that names the path. Checksum files of Hadoop's local file
system are neither written nor needed.
Cost: a call of the JVM for each question.
"""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jllm import atomic
from jllm.data.dataset.files import FOOTER_TAIL, MAGIC
from jllm.errors import UserError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileStatus:
    """A file or folder.

    Attributes:
        path: full URI.
        size: bytes.
        modified: milliseconds.
        is_folder: whether it is one.
    """

    path: str
    size: int
    modified: int
    is_folder: bool


class HadoopFiles:
    """The file systems of a session."""

    def __init__(self, spark: "SparkSession") -> None:
        self._jvm: Any = spark.sparkContext._jvm
        self._conf = spark.sparkContext._jsc.hadoopConfiguration()  # type: ignore[union-attr]

    def _at(self, path: str) -> tuple[Any, Any]:
        """The file system of a path, without checksum files, and the path."""
        hadoop = self._jvm.org.apache.hadoop.fs.Path(path)
        system = hadoop.getFileSystem(self._conf)
        if self._jvm.java.lang.Class.forName("org.apache.hadoop.fs.ChecksumFileSystem").isInstance(system):
            system = system.getRawFileSystem()
        return system, hadoop

    def _asked(self, path: str, question: Any) -> Any:
        from py4j.protocol import Py4JError, Py4JJavaError
        from pyspark.errors import PySparkException

        try:
            return question(*self._at(path))
        except Py4JJavaError as error:
            raise UserError(f"{path}: {reason_of(error.java_exception)}") from None
        except PySparkException as error:
            raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None
        except (UnicodeError, Py4JError) as error:
            raise UserError(f"{path}: cannot be named to Spark ({type(error).__name__}); rename it") from None

    def qualified(self, path: str) -> str:
        """The path as a full URI; a local one is of this process's working folder, not of the JVM's."""
        if "://" not in path and not path.startswith("file:") and self._default_is_local:
            path = os.path.expanduser(path)
            # Hadoop takes away `..` as text, and behind a link that is another place.
            path = f"file:{os.path.realpath(path) if '..' in path.split('/') else os.path.abspath(path)}"
        return str(self._asked(path, lambda system, at: system.makeQualified(at).toString()))

    @property
    def _default_is_local(self) -> bool:
        return str(self._conf.get("fs.defaultFS", "file:///")).startswith("file:")

    def exists(self, path: str) -> bool:
        return bool(self._asked(path, lambda system, at: system.exists(at)))

    def status(self, path: str) -> FileStatus | None:
        """None where there is nothing."""
        if not self.exists(path):
            return None
        return _status(self._asked(path, lambda system, at: system.getFileStatus(at)))

    def matching(self, pattern: str) -> list[FileStatus]:
        """What a glob names, sorted."""
        found = self._asked(pattern, lambda system, at: list(system.globStatus(at) or ()))
        return sorted((_status(one) for one in found), key=lambda one: one.path)

    def inside(self, folder: str) -> list[FileStatus]:
        """What lies directly in a folder, sorted."""
        found = self._asked(folder, lambda system, at: list(system.listStatus(at)))
        return sorted((_status(one) for one in found), key=lambda one: one.path)

    def below(self, folder: str) -> list[FileStatus]:
        """All files below a folder, at any depth, sorted."""
        found: list[FileStatus] = []
        for one in self.inside(folder):
            found += self.below(one.path) if one.is_folder else [one]
        return found

    def read(self, path: str) -> str:
        """A whole file of text."""

        def ask(system: Any, at: Any) -> str:
            stream = system.open(at)
            try:
                return str(self._jvm.org.apache.commons.io.IOUtils.toString(stream, "UTF-8"))
            finally:
                stream.close()

        return str(self._asked(path, ask))

    def footer_of(self, path: str, size: int) -> str | None:
        """sha256 of a Parquet file's footer, in hex, as `dataset.files.footer_of`; None where it is none."""

        def ask(system: Any, at: Any) -> str | None:
            stream = system.open(at)
            to_bytes = self._jvm.org.apache.commons.io.IOUtils.toByteArray
            try:
                stream.seek(max(0, size - FOOTER_TAIL))
                tail = bytes(to_bytes(stream))
                if tail[4:] != MAGIC:
                    return None
                length = int.from_bytes(tail[:4], "little")
                stream.seek(max(0, size - FOOTER_TAIL - length))
                return hashlib.sha256(bytes(to_bytes(stream))[:length]).hexdigest()
            finally:
                stream.close()

        found: str | None = self._asked(path, ask)
        return found

    def write(self, path: str, text: str, *, replace: bool = True) -> bool:
        """Write a file, which is there completely or not at all; False where there is one and it is not replaced."""

        def put(system: Any, at: Any) -> bool:
            if not replace and system.exists(at):
                return False
            beside = self._jvm.org.apache.hadoop.fs.Path(at.getParent(), f".{at.getName()}.tmp")
            whole = str(system.makeQualified(at).toString())
            if is_local(whole):  # Hadoop would write through a link of that name
                system.mkdirs(at.getParent())
                atomic.create(atomic.temporary_name(Path(local_path(whole))))
            stream = system.create(beside, True)
            stream.write(bytearray(text.encode()))
            stream.close()
            if replace:
                system.delete(at, False)
            return bool(system.rename(beside, at))

        done = bool(self._asked(path, put))
        if replace and not done:
            raise UserError(f"{path}: cannot be written")
        return done

    def rename(self, old: str, new: str) -> None:
        """Rename a file; the new name must be free."""

        def move(system: Any, at: Any) -> bool:
            return bool(system.rename(at, self._jvm.org.apache.hadoop.fs.Path(new)))

        if not self._asked(old, move):
            raise UserError(f"{new}: {old} cannot be moved there; allow it, and run the same command again")

    def make_folder(self, path: str) -> None:
        if not self._asked(path, lambda system, at: system.mkdirs(at)):
            raise UserError(f"{path}: cannot be made; give another folder")

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing happens where there is none."""
        self._asked(path, lambda system, at: system.delete(at, True))

    def remove_if_empty(self, folder: str) -> bool:
        """Remove a folder in which nothing is; whether it was one."""
        found = self.status(folder)
        if found is None or not found.is_folder or self.inside(folder):
            return False
        return bool(self._asked(folder, lambda system, at: system.delete(at, False)))


def _status(status: Any) -> FileStatus:
    return FileStatus(
        path=str(status.getPath().toString()),
        size=int(status.getLen()),
        modified=int(status.getModificationTime()),
        is_folder=bool(status.isDirectory()),
    )


def reason_of(java: Any) -> str:
    """What an exception of Java says, in a few words."""
    name = str(java.getClass().getSimpleName())
    text = str(java.getMessage() or "").splitlines()
    return f"{name}: {text[0][:300]}" if text else name


def joined(folder: str, *names: str) -> str:
    """A path below a folder."""
    return "/".join([folder.rstrip("/"), *names])


def bare(path: str) -> str:
    """A full path without scheme and slashes in front, which are written in several ways."""
    return path.split(":", 1)[-1].lstrip("/")


def is_local(place: str) -> bool:
    """Whether a full URI names a file of this machine, or of a folder that all share under one name."""
    return place.startswith("file:")


def local_path(place: str) -> str:
    """The path of a local full URI."""
    return "/" + bare(place)


def is_link(place: str) -> bool:
    """Whether a full URI names a link of this machine."""
    return is_local(place) and os.path.islink(local_path(place))
