"""`--control_class`: the class of each document, for control adapters (`jllm.models.adapters.control`).

An option is `GLOB=CLASS`. The glob is compared with the name of a source below the folder or glob that was given, with
its file name, and with its whole path; the first option that fits decides. Class `random` is 1 or -1 by a hash of the
document's ids: half of all different documents each, and the same ones in every run.

Guarantees: every source has a class and every option a source, or the run is refused. Cost: for `random` some passes of
numpy over the ids.
"""

import dataclasses
import fnmatch
from collections.abc import Sequence
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray

from jllm.data.dataset.columns import CONTROL_CLASS
from jllm.data.dataset.further import FurtherColumns
from jllm.data.packing.documents import Documents
from jllm.data.prepare.encoding import ChunkEncoder, Encoded
from jllm.data.prepare.holdout import document_hashes
from jllm.data.sources.chunk import Chunk
from jllm.data.sources.inputs import Source
from jllm.errors import UserError

RANDOM = None
"""The class of a source whose documents have one by their hash."""
_CLASSES = {"+1": 1, "1": 1, "-1": -1, "0": 0, "random": RANDOM}
_SALT = 0x636F6E74726F6C  # another than that of what is held out, so that both classes are held out alike


def parsed(given: Sequence[str]) -> list[tuple[str, int | None]]:
    """The options taken apart: globs and classes, `RANDOM` for random.

    Raises:
        UserError: not `GLOB=CLASS`.
    """
    found = []
    for item in given:
        glob, equals, name = item.rpartition("=")
        if not equals or not glob or name not in _CLASSES:
            raise UserError(f"--control_class {item}: write GLOB=CLASS, the class being +1, -1, 0 or random")
        found.append((glob, _CLASSES[name]))
    return found


def classes_of(given: Sequence[str], sources: Sequence[Source]) -> tuple[int | None, ...]:
    """The class of each source's documents, `RANDOM` for random.

    Raises:
        UserError: not `GLOB=CLASS`, a source without a class, or an option that says nothing of any source. A `*` for
            all that is left may find nothing left.
    """
    options = parsed(given)
    fitting: set[int] = set()
    used = {number for number, (glob, _) in enumerate(options) if not glob.strip("*")}
    found: list[int | None] = []
    for source in sources:
        names = {source.name, source.path, PurePath(source.path).name}
        fits = [
            number for number, (glob, _) in enumerate(options) if any(fnmatch.fnmatchcase(name, glob) for name in names)
        ]
        if not fits:
            raise UserError(
                f"--control_class: no glob fits {source.name}; give its class too, such as --control_class '*=0' at the"
                " end for all that is left"
            )
        fitting.update(fits)
        used.add(fits[0])
        found.append(options[fits[0]][1])
    for number, item in enumerate(given):
        if number not in fitting | used:
            raise UserError(f"--control_class {item}: fits none of the {len(sources)} input files; correct or drop it")
        if number not in used:
            raise UserError(
                f"--control_class {item}: a glob before it fits every file that it fits, and the first one counts;"
                " give it before that, or drop it"
            )
    return tuple(found)


def random_classes(documents: Documents) -> NDArray[np.int8]:
    """[N] 1 or -1 for each document, by its ids alone."""
    bits = (document_hashes(documents, _SALT) >> np.uint64(63)).astype(np.int8)
    return 2 * bits - np.int8(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassEncoder:
    """An encoder whose documents have control classes.

    Attributes:
        encoder: what makes the documents.
        classes: of each source, as `classes_of` gives them.
    """

    encoder: ChunkEncoder
    classes: tuple[int | None, ...]

    def __call__(self, chunk: Chunk, kind: str) -> Encoded:
        encoded = self.encoder(chunk, kind)
        documents, given = encoded.documents, self.classes[chunk.source]
        classes = random_classes(documents) if given is RANDOM else np.full(len(documents), given, dtype=np.int8)
        return dataclasses.replace(encoded, documents=dataclasses.replace(documents, classes=classes))


def columns_of(given: Sequence[str]) -> FurtherColumns:
    """What the rows of a run have beside the columns of the contract."""
    return FurtherColumns(carried=(CONTROL_CLASS,) if given else ())


def with_classes(given: Sequence[str], sources: Sequence[Source], encoder: ChunkEncoder) -> ChunkEncoder:
    """The encoder of a run: with control classes where the options ask for them.

    Raises:
        UserError: as `classes_of`.
    """
    return ClassEncoder(encoder=encoder, classes=classes_of(given, sources)) if given else encoder
