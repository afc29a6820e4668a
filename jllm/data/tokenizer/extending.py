"""New tokens for a tokenizer: each gets the next id after the largest one that is used, and is encoded as that one id.

Guarantees: new ids are unique and contiguous; what the tokenizer gave for other texts it gives still (tried on the
probes of `jllm.data.tokenizer.facts`); the folder that is written loads in transformers, and every new token is encoded
there as one id.
Cost: transformers loads the tokenizer, twice.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jllm.data.tokenizer.facts import PROBES, auto_tokenizer
from jllm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewTokens:
    """A tokenizer with new tokens.

    Attributes:
        ids: of the new tokens, ascending.
        known: tokens that were there already → their ids.
        first: the id after the largest that was used before.
    """

    ids: dict[str, int]
    known: dict[str, int]
    first: int
    _tokenizer: Any
    _probes: list[list[int]]

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, and try them.

        Raises:
            UserError: read back, it is not what it should be.
        """
        self._tokenizer.save_pretrained(folder)
        again = auto_tokenizer(str(folder), trust_remote_code=False)
        _check_encoded(again, self.ids)
        if _probed(again, self.ids) != self._probes:
            raise UserError(
                f"{folder}: with the new tokens the tokenizer gives other ids for other texts; give tokens that no text"
                " has by chance"
            )
        if again.chat_template != self._tokenizer.chat_template:
            raise UserError(f"{folder}: the chat template is not what it was; transformers cannot keep it")


def new_tokens(folder: Path, *, plain: Sequence[str], special: Sequence[str]) -> NewTokens:
    """Add tokens to the tokenizer in `folder`, which stays as it is.

    Args:
        folder: of a model or a tokenizer.
        plain: tokens that are text, and stay in what is decoded.
        special: control tokens, which are left out of what is decoded where special tokens are skipped.

    Raises:
        UserError: there is no tokenizer that this works with, a token is empty, given as both kinds, or cannot be one
            id.
    """
    for token in (*plain, *special):
        if not token.strip():
            raise UserError(f"--add {token!r}: nothing but white space; give a text")
    if both := sorted(set(plain) & set(special)):
        raise UserError(f"{both[0]!r} is given as a plain and as a special token; drop one")
    try:
        tokenizer = auto_tokenizer(str(folder), trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f"{folder} has no tokenizer that transformers loads ({why}); give a folder with one") from None
    if not tokenizer.is_fast:
        raise UserError(
            f"{folder}: the tokenizer has no tokenizer.json, and none can be made; nothing can be added to it"
        )
    used = tokenizer.get_vocab()
    known = {token: used[token] for token in (*plain, *special) if token in used}
    first = max(used.values(), default=-1) + 1
    probes = _probed(tokenizer, [*plain, *special])
    wanted = [token for token in dict.fromkeys((*plain, *special)) if token not in known]
    _add(tokenizer, wanted, frozenset(special))
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in wanted}
    if list(ids.values()) != list(range(first, first + len(wanted))):
        raise UserError(
            f"{folder}: the tokenizer has gaps among its ids, so that new tokens would get ids that are used"
            f" ({sorted(ids.values())[:3]} before {first}); nothing can be added to it"
        )
    _check_encoded(tokenizer, ids)
    return NewTokens(ids=ids, known=known, first=first, _tokenizer=tokenizer, _probes=probes)


def _add(tokenizer: Any, tokens: Sequence[str], special: frozenset[str]) -> None:
    """One at a time, so that ids are in the order that was given."""
    from tokenizers import AddedToken

    for token in tokens:
        is_special = token in special
        tokenizer.add_tokens([AddedToken(token, special=is_special, normalized=False)], special_tokens=is_special)


def _probed(tokenizer: Any, tokens: Sequence[str] | dict[str, int]) -> list[list[int]]:
    """What the tokenizer gives for texts without the new tokens."""
    texts = [probe for probe in PROBES if not any(token in probe for token in tokens)]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def _check_encoded(tokenizer: Any, ids: dict[str, int]) -> None:
    for token, number in ids.items():
        found = tokenizer.encode(token, add_special_tokens=False)
        if found != [number]:
            raise UserError(f"{token!r} is encoded as {found}, and not as its own id {number}; give another text")
