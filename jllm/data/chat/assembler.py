"""Rendered conversations to ids and labels.

The texts of a whole chunk are encoded in one call; ids of control tokens are put between theirs, and trained spans
become labels (`token_spans.py`).

Guarantees: in checked chunks one whole conversation, encoded by the reference in one go, has the same ids.
Cost: numpy over whole chunks; no Python object for a token.
"""

import dataclasses

import numpy as np

from jllm.data.chat.rendered import Rendered
from jllm.data.chat.token_spans import TokenLengths
from jllm.data.dataset.columns import IGNORE_INDEX
from jllm.data.packing.documents import Documents
from jllm.data.tokenizer.checked_engine import CheckedEngine, EngineMismatchError
from jllm.errors import UserError


def _first_marked(rendered: Rendered) -> Rendered:
    """A space before each text that opens a conversation: the tokenizer turns it into the mark that belongs there."""
    is_text = rendered.sequence < 0
    opens = rendered.offsets[:-1][np.diff(rendered.offsets) > 0]
    numbers = np.cumsum(is_text) - 1
    texts, spans = list(rendered.texts), rendered.spans.copy()
    for number in numbers[opens[is_text[opens]]].tolist():
        if not texts[number].startswith((" ", "▁")):
            texts[number] = f" {texts[number]}"
            spans[spans[:, 0] == number, 1:] += 1
    return dataclasses.replace(rendered, texts=texts, spans=spans)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assembler:
    """Encodes the texts of rendered conversations and puts the ids together."""

    engine: CheckedEngine
    lengths: TokenLengths

    def assemble(self, rendered: Rendered, *, chunk: int = 0) -> tuple[Documents, int]:
        """The conversations, and the number of checks made.

        Args:
            chunk: number of their chunk in its source.

        Raises:
            EngineMismatchError: a whole conversation, encoded by the reference in one go, has other ids.
            UserError: the same, where the reference itself encoded the segments.
        """
        engine, lengths = self.engine, self.lengths
        if lengths.marks_first:
            rendered = _first_marked(rendered)
        ids, offsets = engine.encode(rendered.texts)
        mask = lengths.tokens_of_spans(engine, rendered.texts, ids, offsets, rendered.spans)
        is_text = rendered.sequence < 0
        sizes = np.ones(len(rendered.sequence), dtype=np.int64)
        sizes[is_text] = np.diff(offsets)
        starts = np.zeros(len(sizes) + 1, dtype=np.int64)
        np.cumsum(sizes, out=starts[1:])
        result = np.empty(starts[-1], dtype=np.int32)
        trained = np.empty(starts[-1], dtype=bool)
        from_text = np.repeat(is_text, sizes)
        result[from_text], trained[from_text] = ids, mask
        result[starts[:-1][~is_text]] = rendered.sequence[~is_text]
        trained[starts[:-1][~is_text]] = rendered.trained[~is_text]
        documents = Documents(
            ids=result,
            offsets=starts[rendered.offsets],
            labels=np.where(trained, result, np.int32(IGNORE_INDEX)),
        )
        checks = 0
        if rendered.sample is not None:
            number, text = rendered.sample
            wanted = engine.reference_ids(text, chunk=chunk)
            if wanted is not None:
                checks = 1
                given = result[documents.offsets[number] : documents.offsets[number + 1]]
                if not np.array_equal(given, wanted) and engine.name == "hf":
                    raise UserError(
                        f"this tokenizer encodes a conversation differently in pieces than as a whole ({text[:40]!r});"
                        " use another tokenizer, or another --chat_template"
                    )
                if not np.array_equal(given, wanted):
                    raise EngineMismatchError(
                        f"{engine.name} {engine.version} differs on the conversation {text[:40]!r}"
                    )
        return documents, checks
