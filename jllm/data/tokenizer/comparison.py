"""Whether the tokenizer that made a data set is another one's equal, and where they part.

What counts is what tokenizers do: which text has which id. A tokenizer that was saved anew by another version of its
library has other bytes and is the same.

Cost: none where they are the same; otherwise the vocabularies are read.
"""

from pathlib import Path

from jllm.data.dataset.manifest import DataSet, Tokenizer
from jllm.data.tokenizer import fast_json
from jllm.data.tokenizer.facts import TokenizerFacts, load_tokenizer
from jllm.errors import UserError


def difference(data_set: DataSet, other: TokenizerFacts) -> str | None:
    """Where another tokenizer than the recorded one would have made other ids, for people; None: nowhere.

    A manifest of an older version of jllm records a hash of bytes alone, which is then what is compared.
    """
    recorded = data_set.manifest.tokenizer
    if recorded is None or recorded.is_same(other.for_manifest):
        return None
    if recorded.vocabulary_sha256 is None or recorded.probe_ids is None:
        return (
            f"its manifest has only a hash of the tokenizer's bytes, {recorded.sha256[:12]}, and the other's is"
            f" {other.sha256[:12]}; to compare what they do, add the rest with: jllm manifest {data_set.folder}"
            " --tokenizer FOLDER, the one that made it"
        )
    return (
        _other_added_token(recorded.added_tokens, other)
        or _other_entry(_made_with(data_set), other)
        or _other_probe(recorded, other)
        or f"their vocabularies, of {recorded.vocab_size:,} and {other.vocab_size:,} tokens, are not the same"
    )


def _made_with(data_set: DataSet) -> TokenizerFacts | None:
    """The tokenizer that made a data set, where its folder is still there and still what it was."""
    given = data_set.manifest.options.get("tokenizer")
    recorded = data_set.manifest.tokenizer
    if not isinstance(given, str) or recorded is None or not Path(given).is_dir():
        return None
    try:
        found = load_tokenizer(given)
    except UserError:
        return None
    return found if recorded.is_same(found.for_manifest) else None


def _other_added_token(recorded: dict[str, int] | None, other: TokenizerFacts) -> str | None:
    if recorded is None:
        return None
    return _first_other(recorded, {str(token["content"]): int(token["id"]) for token in other.added})


def _other_entry(made_with: TokenizerFacts | None, other: TokenizerFacts) -> str | None:
    return None if made_with is None else _first_other(vocabulary_of(made_with), vocabulary_of(other))


def _first_other(ours: dict[str, int], others: dict[str, int]) -> str | None:
    """The token with the smallest id that two vocabularies differ in."""
    wrong = ((identity, token) for token, identity in ours.items() if others.get(token) != identity)
    if (first := min(wrong, default=None)) is not None:
        identity, token = first
        there = others.get(token)
        return f"the token {token!r} has the id {identity} there and " + ("none" if there is None else str(there))
    more = ((identity, token) for token, identity in others.items() if token not in ours)
    if (first := min(more, default=None)) is not None:
        return f"the token {first[1]!r} has no id there and {first[0]}"
    return None


def _other_probe(recorded: Tokenizer, other: TokenizerFacts) -> str | None:
    """The first of the texts with known ids that becomes other ones."""
    known = recorded.probe_ids or {}
    tokens: dict[int, str] = {}
    for text, ids in zip(other.probes, other.probe_ids, strict=True):
        before = known.get(text)
        if before is None or before == list(ids):
            continue
        place = next((i for i, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), None)
        if place is None:
            return f"the text {text[:40]!r} becomes {len(before)} ids there and {len(ids)}"
        tokens = tokens or {identity: token for token, identity in vocabulary_of(other).items()}
        named = f" ({tokens[ids[place]]!r})" if ids[place] in tokens else ""
        return f"in the text {text[:40]!r} token {place + 1} has the id {before[place]} there and {ids[place]}{named}"
    return None


def vocabulary_of(facts: TokenizerFacts) -> dict[str, int]:
    """Token → id, added tokens included; of a tokenizer without a fast backend, the added ones alone."""
    known: dict[str, int] = {}
    if facts.backend is not None:
        vocabulary = fast_json.loads(facts.backend)["model"].get("vocab", {})
        if isinstance(vocabulary, dict):
            known.update(vocabulary)
        else:  # pieces with their scores, in the order of their ids
            known.update({piece[0]: number for number, piece in enumerate(vocabulary)})
    known.update({str(token["content"]): int(token["id"]) for token in facts.added})
    return known
