"""Ids back to text, for people."""

from collections.abc import Callable, Sequence

from jllm.data.dataset.manifest import Tokenizer
from jllm.data.tokenizer.facts import load_tokenizer
from jllm.errors import UserError


def make_decoder(name: str, made_with: Tokenizer | None) -> Callable[[Sequence[int]], str]:
    """What turns ids to text by the tokenizer `name`, which must be the one that a data set was made with.

    Raises:
        UserError: it is another, or has no fast backend.
    """
    facts = load_tokenizer(name)
    if made_with is not None and not made_with.is_same(facts.for_manifest):
        raise UserError(f"--tokenizer {name}: the data set was made with another tokenizer ({made_with.name})")
    if facts.backend is None:
        raise UserError(f"--tokenizer {name}: has no fast backend to decode with; leave it out to see the ids")
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(facts.backend)

    def decode(ids: Sequence[int]) -> str:
        text: str = backend.decode(ids, skip_special_tokens=False)
        return text

    return decode
