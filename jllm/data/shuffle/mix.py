"""Mixing: how often each row of each data set is taken.

A weight of 2.5 takes every row twice and half of the rows a third time; which half is a function of the data's
fingerprint and the seed. Weights are rates (`by` "rate", the default), or shares of the whole mixture counted in rows
or in tokens; shares of a `total`, or else of the largest mixture that repeats no row. Within a set, rows can be
weighted by the text in their `source` column. Caps on rows and tokens come last: a capped set takes rows in its random
order until the next one would exceed the cap.

Cost: 1-4 bytes of memory a row, and where tokens are counted, one more reading of the row lengths.
"""

import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jllm.data.dataset.columns import CU_SEQLENS, INPUT_IDS, SOURCE_TAG, Int64
from jllm.data.dataset.manifest import DataSet
from jllm.data.dataset.reader import ShardReader
from jllm.data.dataset.token_counts import real_lengths
from jllm.errors import UserError, did_you_mean
from jllm.guards import notation
from jllm.machine import parse_count

BY = ("rate", "rows", "tokens")
SELECTION = 0x6D6978
"""Goes into the seed, so that the choice of rows and their order are independent."""
ROUNDING = 1e-9

Copies = NDArray[np.unsignedinteger[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetShare:
    """What the user asked for one set. `subsample` keeps that share of its rows before anything else happens."""

    weight: float = 1.0
    subsample: float = 1.0
    max_rows: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.weight < math.inf):
            raise UserError(f"--mix: weight {self.weight}: give 0 (leave the set out) or more")
        if not 0 < self.subsample <= 1:
            raise UserError(f"--mix: subsample {self.subsample}: give a share above 0 and at most 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """What the user asked for: `sets` and `sources` by name, the rest by `default`."""

    by: str = "rate"
    total: int | None = None
    sets: dict[str, SetShare] = dataclasses.field(default_factory=dict)
    sources: dict[str, float] = dataclasses.field(default_factory=dict)
    max_tokens: int | None = None


MOST_OFTEN = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is taken of one set, independently of the others: `rate` times its rows, or `rows`, or `tokens`."""

    rate: float | None = None
    rows: int | None = None
    tokens: int | None = None
    subsample: float = 1.0
    max_rows: int | None = None
    max_tokens: int | None = None
    sources: tuple[tuple[str, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For the manifest: what differs from taking every row once."""
        facts = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        facts["sources"] = dict(self.sources)
        return {key: value for key, value in facts.items() if value not in ({},) and (key, value) != ("subsample", 1.0)}


ALL_ONCE = Recipe(rate=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSelection:
    """How often each row is taken (None: every row once), and the source tags that were found (None: nobody looked)."""

    copies: Copies | None
    source_tags: frozenset[str] | None = None


def read_mix(pairs: Sequence[str], *, by: str | None, total: str | None, max_tokens: Sequence[str]) -> Mix:
    """The mixture from `--mix` (a TOML file, or `set=weight`), `--mix_by`, `--mix_total` and `--max_tokens`.

    Raises:
        UserError: what cannot be read or is unknown.
    """
    document: dict[str, Any] = {}
    files = [pair for pair in pairs if "=" not in pair]
    if len(files) > 1:
        raise UserError(f"--mix {files[1]}: give one file, and set=weight for what differs")
    for name in files:
        document = _read_file(Path(name))
    _refuse_twice("--mix", [pair.rpartition("=")[0] for pair in pairs if "=" in pair])
    _refuse_twice("--max_tokens", [text.rpartition("=")[0] for text in max_tokens])
    for key in ("sets", "sources"):
        if not isinstance(document.get(key, {}), dict):
            raise UserError(f"--mix: {key} is no table; write [{key}] and under it name = weight")
    sets = {name: _share(name, value) for name, value in document.get("sets", {}).items()}
    sources = {name: _number(name, value) for name, value in document.get("sources", {}).items()}
    for pair in pairs:
        if "=" in pair:
            name, _, value = pair.rpartition("=")
            if name.startswith(f"{SOURCE_TAG.name}:"):
                sources[name.removeprefix(f"{SOURCE_TAG.name}:")] = _number(name, value)
            else:
                sets[name] = dataclasses.replace(sets.get(name, SetShare()), weight=_number(name, value))
    cap = None
    for text in max_tokens:
        name, _, value = text.rpartition("=")
        if name:
            sets[name] = dataclasses.replace(
                sets.get(name, SetShare()), max_tokens=parse_count(f"--max_tokens {name}", value)
            )
        else:
            cap = parse_count("--max_tokens", value)
    way = by or document.get("by", "rate")
    if way not in BY:
        raise UserError(f'--mix: by "{way}": give one of {", ".join(BY)}')
    whole = total or document.get("total")
    if whole is not None and way == "rate":
        raise UserError("--mix_total: only shares have a total; add --mix_by rows or --mix_by tokens")
    if way == "rate":
        for name, rate in [*((name, share.weight) for name, share in sets.items()), *sources.items()]:
            if rate > MOST_OFTEN:
                raise UserError(f"--mix {name}={rate:g}: give at most {MOST_OFTEN:,}: so often is each row taken")
    if sources and way != "rate":
        raise UserError(f"--mix: sources are weighted by rate, not by {way}; leave out --mix_by")
    return Mix(
        by=way,
        total=parse_count("--mix_total", str(whole)) if whole is not None else None,
        sets=sets,
        sources=sources,
        max_tokens=cap,
    )


def _refuse_twice(option: str, names: Sequence[str]) -> None:
    """Raises:
    UserError: a name is among them twice; "" stands for all data sets.
    """
    for name in names:
        if names.count(name) > 1:
            of = f"{name} has" if name else "all data sets have"
            raise UserError(f"{option}: {of} {names.count(name)} values; give one")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        document = notation.loads_toml(notation.read_text(path))
    except OSError as error:
        raise UserError(f"--mix {path}: {error.strerror}; give a TOML file, or set=weight") from None
    except ValueError as error:
        raise UserError(f"--mix {path}: not valid TOML: {error}") from None
    known = ("by", "total", "sets", "sources")
    for key in document:
        if key not in known:
            raise UserError(f'--mix {path}: unknown key "{key}"; known: {", ".join(known)}.{did_you_mean(key, known)}')
    return document


def _share(name: str, value: Any) -> SetShare:
    if not isinstance(value, dict):
        return SetShare(weight=_number(name, value))
    known = [field.name for field in dataclasses.fields(SetShare)]
    for key in value:
        if key not in known:
            raise UserError(
                f'--mix: set {name}: unknown key "{key}"; known: {", ".join(known)}.{did_you_mean(key, known)}'
            )
    caps = {key: parse_count(f"--mix: {name}.{key}", str(value[key])) for key in known[2:] if key in value}
    return SetShare(
        weight=_number(f"{name}.weight", value.get("weight", 1)),
        subsample=_number(f"{name}.subsample", value.get("subsample", 1)),
        max_rows=caps.get("max_rows"),
        max_tokens=caps.get("max_tokens"),
    )


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
        if isinstance(value, bool) or not math.isfinite(number):
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"--mix {name}={str(value)[:60]}: the weight must be a number") from None


def make_recipes(mix: Mix, sets: Sequence[DataSet]) -> dict[str, Recipe]:
    """The recipe of every set; sets of weight 0 have none.

    Raises:
        UserError: a name that is no set, a set without a share, or tokens that nobody counted.
    """
    names = [data_set.name for data_set in sets]
    for name in mix.sets:
        if name not in names:
            raise UserError(f'--mix: no data set "{name}"; there are: {", ".join(names)}.{did_you_mean(name, names)}')
    shares = {name: mix.sets.get(name, SetShare()) for name in names}
    if mix.by != "rate" and set(mix.sets) != set(names):
        left = ", ".join(name for name in names if name not in mix.sets)
        raise UserError(f"--mix: no share for {left}; shares need every set (0 leaves a set out)")
    sizes = {data_set.name: _size(data_set, mix.by) for data_set in sets}
    weights = {name: share.weight for name, share in shares.items()}
    if not any(weights.values()):
        raise UserError("--mix: every weight is 0, so that nothing is left; give some set a weight")
    recipes = {}
    for name, share in shares.items():
        if share.weight == 0:
            continue
        limits = {"subsample": share.subsample, "max_rows": share.max_rows}
        recipes[name] = Recipe(
            **_amount(mix, name, weights, {key: int(sizes[key] * shares[key].subsample) for key in names}),  # type: ignore[arg-type]
            **limits,  # type: ignore[arg-type]
            max_tokens=share.max_tokens if share.max_tokens is not None else mix.max_tokens,
            sources=tuple(sorted(mix.sources.items())),
        )
    return recipes


def _size(data_set: DataSet, by: str) -> int:
    if by != "tokens":
        return data_set.manifest.rows
    tokens = data_set.manifest.total("tokens")
    if tokens is None:
        raise UserError(
            f"{data_set.folder}: its tokens are not known; count them with: jllm manifest --force {data_set.folder}"
        )
    return tokens


def _amount(mix: Mix, name: str, weights: dict[str, float], sizes: dict[str, int]) -> dict[str, float | int]:
    if mix.by == "rate":
        return {"rate": weights[name]}
    # Without a total: as much as the scarcest set allows without repeating a row.
    scale = min(sizes[key] / weight for key, weight in weights.items() if weight)
    if mix.total is not None:
        scale = mix.total / sum(weights.values())
    return {mix.by: math.floor(weights[name] * scale + ROUNDING)}


def select_rows(data_set: DataSet, recipe: Recipe, *, seed: int, cores: int) -> RowSelection:
    """Decide how often each row is taken: a function of the data's fingerprint, the recipe and the seed."""
    if recipe == ALL_ONCE:
        return RowSelection(copies=None)
    rows = data_set.manifest.rows
    entropy = [seed, SELECTION, *np.frombuffer(bytes.fromhex(data_set.manifest.fingerprint), dtype=">u4").tolist()]
    order = np.random.default_rng(entropy).permutation(rows)
    counted = recipe.tokens is not None or recipe.max_tokens is not None
    lengths = row_lengths(data_set, cores=cores) if counted else None
    order = order[: math.floor(rows * recipe.subsample + ROUNDING)]
    copies: Copies = np.zeros(rows, dtype=np.uint32)
    found: frozenset[str] | None = None
    if recipe.rate is not None and recipe.sources:
        tags = row_sources(data_set)
        found = frozenset(np.unique(tags).tolist())
        weights = dict(recipe.sources)
        for tag in found:
            of_tag = order[tags[order] == tag]
            _take_rows(copies, of_tag, len(of_tag) * recipe.rate * weights.get(tag, 1.0))
    elif recipe.tokens is not None:
        assert lengths is not None
        _take_tokens(copies, order, lengths, recipe.tokens)
    else:
        _take_rows(copies, order, len(order) * recipe.rate if recipe.rate is not None else recipe.rows or 0)
    if recipe.max_tokens is not None:
        assert lengths is not None
        if int((copies * lengths).sum()) > recipe.max_tokens:
            copies = _capped(copies, order, lengths, recipe.max_tokens)
    if recipe.max_rows is not None and int(copies.sum()) > recipe.max_rows:
        copies = _capped(copies, order, np.ones(rows, np.int64), recipe.max_rows)
    return RowSelection(copies=copies.astype(np.min_scalar_type(int(copies.max(initial=0)))), source_tags=found)


def _take_rows(copies: Copies, order: Int64, count: float) -> None:
    if len(order):
        whole, rest = divmod(math.floor(count + ROUNDING), len(order))
        copies[order] += np.uint32(whole)
        copies[order[:rest]] += np.uint32(1)


def _take_tokens(copies: Copies, order: Int64, lengths: Int64, tokens: int) -> None:
    running = np.cumsum(lengths[order])
    if not len(running) or running[-1] == 0:
        return
    whole, rest = divmod(tokens, int(running[-1]))
    copies[order] += np.uint32(whole)
    copies[order[: np.searchsorted(running, rest, side="right")]] += np.uint32(1)


def _capped(copies: Copies, order: Int64, sizes: Int64, cap: int) -> Copies:
    """The copies in passes over the random order, first copies first, until the next would exceed the cap."""
    kept = np.zeros_like(copies)
    used = 0
    for number in range(int(copies.max(initial=0))):
        turn = order[copies[order] > number]
        running = np.cumsum(sizes[turn])
        fits = int(np.searchsorted(running, cap - used, side="right"))
        kept[turn[:fits]] += np.uint32(1)
        if fits < len(turn):
            break
        used += int(running[-1])
    return kept


def row_lengths(data_set: DataSet, *, cores: int) -> Int64:
    """The real tokens of every row."""

    def of_file(path: Path) -> list[Int64]:
        reader = ShardReader(path, columns=[INPUT_IDS])
        column = CU_SEQLENS if CU_SEQLENS in reader.columns else INPUT_IDS
        groups = range(reader.metadata.num_row_groups)
        if column == CU_SEQLENS:
            return [real_lengths(reader.read_group(group, [column])) for group in groups]
        return [real_lengths(batch) for batch in reader]

    with ThreadPoolExecutor(cores) as pool:
        lengths = [one for file in pool.map(of_file, data_set.paths) for one in file]
    return np.concatenate([np.zeros(0, np.int64), *lengths])


def row_sources(data_set: DataSet) -> NDArray[Any]:
    """The source tag of every row: the text of its `source` column, empty where its file has none."""
    tags: list[NDArray[Any]] = [np.zeros(0, dtype=str)]
    name = SOURCE_TAG.name
    for path in data_set.paths:
        reader = ShardReader(path, columns=[name])
        if SOURCE_TAG in reader.further.carried:
            found = (batch.column(name).to_numpy(zero_copy_only=False) for batch in reader)
            tags.extend(np.asarray(each, dtype=str) for each in found)
        elif name in reader.stored_schema.names:
            kind = reader.stored_schema.field(name).type
            raise UserError(f"{path}: column {name} is {kind}; it must be text to be mixed by")
        else:
            tags.append(np.full(reader.metadata.num_rows, "", dtype=str))
        reader.close()
    return np.concatenate(tags)
