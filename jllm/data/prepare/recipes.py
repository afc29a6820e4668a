"""The options of `raw2ids` turned into what does the work: how conversations are rendered, encoder, packer.

Everything here depends on the options and the tokenizer only, so that the local command and the Spark job ask for the
same encoder and packer (`pretrain_encoder`, `chat_encoder`, `packer_of`) and feed them records of their own.
"""

import datetime
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from jllm.data.chat.assembler import Assembler
from jllm.data.chat.builtin_templates import TEMPLATES
from jllm.data.chat.formats import PAIRS, QUESTION_ANSWER, commonest_format
from jllm.data.chat.records.pairs import CHOSEN, PAIR_FIELDS, REJECTED
from jllm.data.chat.rendering import Renderer, RenderPlan
from jllm.data.packing.best_fit import BestFitPacker
from jllm.data.packing.classes import ClassPacker
from jllm.data.packing.conversations import ConversationPacker
from jllm.data.packing.packers import Packer, StackPacker, WindowPacker
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.prepare.encoding import ChatEncoder, PretrainEncoder, pretrain_affixes
from jllm.data.sources.chunks import read_chunks
from jllm.data.sources.inputs import Source
from jllm.data.sources.parsing import parse_chunk
from jllm.data.tokenizer.checked_engine import CheckedEngine
from jllm.data.tokenizer.facts import TokenizerFacts
from jllm.errors import UserError, did_you_mean


def ids_of(value: str, option: str, engine: CheckedEngine, facts: TokenizerFacts) -> tuple[int, ...]:
    """An option that is text, an id, or a list of ids, as ids. Control tokens in the text are parsed.

    A list is what has brackets around it, is not empty, and has a number among its items, which are separated by
    commas: `[INST]` is text. Without brackets all items are numbers.

    Raises:
        UserError: an item of a list is no number, or no id of the tokenizer.
    """
    text = value.strip()
    in_brackets = text.startswith("[") and text.endswith("]")
    items = [item.strip() for item in (text[1:-1] if in_brackets else text).split(",")]
    numbers = [bool(_NUMBER.fullmatch(item)) for item in items]
    if not (any(numbers) if in_brackets else all(numbers)):
        return tuple(engine.encode([value], parse_special=True)[0].tolist()) if value else ()
    allowed = f"ids are numbers from 0 to {facts.vocab_size - 1}"
    for item, is_number in zip(items, numbers, strict=True):
        if not is_number:
            raise UserError(f'--{option} {value}: "{item}" is no id; {allowed}, and text has no brackets around it')
        if item.startswith("-"):
            raise UserError(f"--{option} {value}: id {item} is below 0; {allowed}")
        if len(item.lstrip("0")) > _MOST_DIGITS or int(item) >= facts.vocab_size:
            raise UserError(
                f"--{option} {value}: id {item} is beyond the vocabulary ({facts.vocab_size} ids); {allowed}"
            )
    return tuple(map(int, items))


_NUMBER = re.compile(r"-?[0-9]+")
_MOST_DIGITS = 18


def sequence_prefix(config: Raw2IdsConfig, engine: CheckedEngine, facts: TokenizerFacts) -> tuple[int, ...]:
    """The ids at the start of every row.

    Raises:
        UserError: they leave no room.
    """
    prefix = ids_of(config.sequence_prefix or "", "sequence_prefix", engine, facts)
    if len(prefix) > config.max_len - 2:
        raise UserError(f"--sequence_prefix: {len(prefix)} tokens leave no room in rows of {config.max_len}")
    return prefix


def pretrain_encoder(config: Raw2IdsConfig, facts: TokenizerFacts, engine: CheckedEngine) -> PretrainEncoder:
    """What encodes a chunk of documents."""
    prefix, suffix = affixes_of(config, facts, engine)
    return PretrainEncoder(
        engine=engine,
        prefix=prefix,
        suffix=suffix,
        field=config.text_field,
        parse_special=config.parse_special,
        masked_ids=facts.special_ids if config.mask_tokens else frozenset(),
    )


def chat_encoder(
    config: Raw2IdsConfig,
    assembler: Assembler,
    *,
    plan: RenderPlan,
    formats: tuple[str, ...],
    names: tuple[str, ...] = (),
) -> ChatEncoder:
    """What encodes a chunk of conversations.

    Args:
        assembler: with the engine, opened with `inert=True`.
        plan, formats, names: how and what conversations are rendered; see `ChatEncoder`.
    """
    return ChatEncoder(
        assembler=assembler,
        plan=plan,
        formats=formats,
        fields=field_map(config),
        longest=None if config.overlong_way == "split" else config.max_len,
        refuse_longer=config.overlong_way == "error",
        names=names,
        pairs=config.type == "preference",
    )


def affixes_of(
    config: Raw2IdsConfig, facts: TokenizerFacts, engine: CheckedEngine
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What goes around a document: the options, or what the tokenizer does itself."""
    prefix = None if config.doc_prefix is None else ids_of(config.doc_prefix, "doc_prefix", engine, facts)
    suffix = None if config.doc_suffix is None else ids_of(config.doc_suffix, "doc_suffix", engine, facts)
    if prefix is not None and suffix is not None:
        return prefix, suffix
    if suffix is not None:
        return facts.prefix, suffix
    own_prefix, own_suffix = pretrain_affixes(facts)
    return (own_prefix if prefix is None else prefix), own_suffix


def document_end_record(config: Raw2IdsConfig, facts: TokenizerFacts, suffix: tuple[int, ...]) -> dict[str, Any]:
    """What documents end in, for the manifest: the ids, and their text where it is known: that of the last one if it
    is a control token, else what the option says."""
    of_id = {token["id"]: token["content"] for token in facts.added}
    named = of_id.get(suffix[-1]) if suffix else ""
    return {"ids": list(suffix), "token": config.doc_suffix if named is None else named}


def packer_of(
    config: Raw2IdsConfig, facts: TokenizerFacts, sequence_prefix: tuple[int, ...] = (), *, labels: bool = False
) -> Packer:
    """A new packer, for one split; `labels` where documents have some."""
    pad_id = facts.pad_id if facts.pad_id is not None else facts.eos_id or 0
    packer = _plain_packer(config, sequence_prefix, pad_id=pad_id, labels=labels)
    if not config.control_class:
        return packer
    classes = _plain_packer(config, (0,) * len(sequence_prefix), pad_id=0, labels=labels)
    return ClassPacker(packer, classes, labels=config.is_chat)


def _plain_packer(config: Raw2IdsConfig, sequence_prefix: tuple[int, ...], *, pad_id: int, labels: bool) -> Packer:
    labels = labels or config.mask_tokens
    pad_to = config.max_len if config.pad else config.pad_to_multiple_of
    chat, pairs = config.is_chat, config.type == "preference"
    if config.is_best_fit:
        return BestFitPacker(
            config.max_len,
            labels=chat or labels,
            pad_to=pad_to,
            pad_id=pad_id,
            conversations=chat and not pairs,
            pairs=pairs,
        )
    if chat:
        return ConversationPacker(config.max_len, pad_to=pad_to, pad_id=pad_id, filter_rows=config.filter)
    if config.stack:
        return StackPacker(config.max_len, labels=labels, prefix=sequence_prefix, drop_tail=config.drop_tails)
    return WindowPacker(
        config.max_len,
        stride=config.stride,
        labels=labels,
        prefix=sequence_prefix,
        drop_tail=config.drop_tails,
    )


def field_map(config: Raw2IdsConfig) -> dict[str, str]:
    """`--field_map user=question,assistant=answer` as role → field; for pairs `prompt`, `chosen`, ... → field."""
    pairs = config.type == "preference"
    if not config.field_map:
        return {} if pairs else QUESTION_ANSWER
    known = PAIR_FIELDS if pairs else ("system", "user", "assistant", "messages", "tools")
    fields = {}
    for pair in config.field_map.split(","):
        role, equals, field = pair.partition("=")
        if not equals or role.strip() not in known or not field.strip():
            raise UserError(
                f"--field_map {config.field_map}: write role=field,..., roles being {', '.join(known[:-1])} and"
                f" {known[-1]}"
            )
        fields[role.strip()] = field.strip()
    if pairs and not {CHOSEN, REJECTED} <= fields.keys():
        raise UserError(f"--field_map {config.field_map}: a pair has a chosen and a rejected answer; name both fields")
    return fields


def format_asked_for(config: Raw2IdsConfig) -> str | None:
    """The format of the records that the options say; None where the records have to say it."""
    if config.type == "preference":
        return PAIRS
    if config.field_map:
        return "fields"
    return None if config.format == "auto" else config.format


def formats_of(config: Raw2IdsConfig, sources: list[Source]) -> tuple[str, ...]:
    """The format of each source: the one asked for, or what most of its first records look like.

    Raises:
        UserError: the first records look like no known format.
    """
    asked = format_asked_for(config)
    if asked is not None:
        return (asked,) * len(sources)
    return tuple(
        source.kind if source.kind == "ids" else _format_of_source(source, number, config.largest_record)
        for number, source in enumerate(sources)
    )


def _format_of_source(source: Source, number: int, most: int) -> str:
    if source.once:
        raise UserError(f"-i {source.path}: it is read once only; say with --format what its records look like")
    first = next(read_chunks(source, number, most=most), None)
    if first is None:
        return "messages"  # of no record
    records = parse_chunk(first, source.kind)
    if records.bad and not records.values:
        bad = records.bad[0]
        raise UserError(
            f"-i {source.name}: none of its first records can be read ({source.name}:{bad.line}: {bad.kind}:"
            f" {bad.detail})"
        )
    return commonest_format(records.values, f"-i {source.name}")


def template_of(config: Raw2IdsConfig, facts: TokenizerFacts) -> tuple[str, str]:
    """The chat template and what it is called: a name of the tokenizer's own, a built-in name, a file, text, or the
    tokenizer's own.

    Raises:
        UserError: there is none of that name, or the tokenizer has none of its own.
    """
    given = config.chat_template
    if given is None:
        if facts.chat_template is None and facts.chat_templates:
            own = ", ".join(sorted(facts.chat_templates))
            raise UserError(
                f"--tokenizer {facts.name}: has several chat templates ({own}), and none that is called default;"
                f" choose one of them with --chat_template, or a built-in one ({', '.join(TEMPLATES)}), or a file"
            )
        if facts.chat_template is None:
            raise UserError(
                f"--tokenizer {facts.name}: has no chat template; choose one with --chat_template"
                f" ({', '.join(TEMPLATES)}, or a file)"
            )
        return facts.chat_template, "the tokenizer's own"
    if given in facts.chat_templates:
        return facts.chat_templates[given], f"the tokenizer's own {given}"
    if given in TEMPLATES:
        return TEMPLATES[given], given
    if "{{" in given or "{%" in given:
        return given, "given as text"
    path = Path(given)
    if not path.is_file():
        names = [*facts.chat_templates, *TEMPLATES]
        raise UserError(
            f"--chat_template {given}: no such file, and no built-in template; there are: {', '.join(names)}."
            f"{did_you_mean(given, names)}"
        )
    try:
        return path.read_text(encoding="utf-8"), path.name
    except UnicodeDecodeError as error:
        raise UserError(
            f"--chat_template {given}: no UTF-8 at byte {error.start}; a template is text in UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"--chat_template {given}: {error.strerror}") from None


def tools_template_of(config: Raw2IdsConfig, facts: TokenizerFacts) -> str | None:
    """The template for conversations with tools, where the tokenizer has one of its own for them, as transformers
    chooses it; None where the same template is for all."""
    return facts.chat_templates.get("tool_use") if config.chat_template is None else None


def template_text(config: Raw2IdsConfig, facts: TokenizerFacts) -> str:
    """All that the templates of a run say, for `date_of`."""
    return template_of(config, facts)[0] + (tools_template_of(config, facts) or "")


def template_hashes(config: Raw2IdsConfig, facts: TokenizerFacts) -> list[str | None]:
    """sha256 of the template's source, and of that for conversations with tools where that is another."""
    sources = (template_of(config, facts)[0], tools_template_of(config, facts))
    return [None if source is None else hashlib.sha256(source.encode()).hexdigest() for source in sources]


def render_plan(config: Raw2IdsConfig, facts: TokenizerFacts, date: str, *, short_cut: bool) -> RenderPlan:
    """How conversations are rendered; also makes sure that the template works.

    Raises:
        UserError: the template is not valid, or answers do not come out of it.
    """
    source, _ = template_of(config, facts)
    given = config.chat_template
    plan = RenderPlan(
        template=source,
        tools_template=tools_template_of(config, facts),
        named=f"--tokenizer {facts.name}: its chat template" if given is None else "--chat_template",
        special_tokens=facts.special_tokens,
        added=facts.added,
        date=date,
        train_on=config.train_on,
        train_on_prompt=config.train_on_prompt,
        prefix=facts.prefix,
        eos_id=facts.eos_id,
        short_cut=short_cut,
        join=config.join.replace("\\n", "\n"),
        ignore_tools=config.ignore_tools,
    )
    for each in (plan, plan.for_tools):
        Renderer(each).check()
    return plan


def template_warnings(plan: RenderPlan) -> list[str]:
    """What is odd about a template without being wrong, one line each."""
    found = [_end_of_turn_warning(each) for each in (plan, plan.for_tools)]
    return list(dict.fromkeys(warning for warning in found if warning is not None))


def _end_of_turn_warning(plan: RenderPlan) -> str | None:
    """What to say of a template after which a model never learns to stop; None where it does."""
    end = Renderer(plan).end_of_turn()
    if end is None or end.trained:
        return None
    if end.token is None:
        return (
            "the chat template writes nothing that ends a turn behind an answer, so the model never learns to stop;"
            " use a template that writes a token of the tokenizer there, such as {{ eos_token }} (--chat_template)"
        )
    return (
        f"the chat template writes {end.token} behind {{% endgeneration %}}, so no end of turn is trained on and the"
        " model never learns to stop; use a template with it before {% endgeneration %} (--chat_template)"
    )


def date_of(config: Raw2IdsConfig, template: str, earlier: str | None) -> str:
    """The date that a template shows: `--date`, that of the run being resumed, or today; "" where it shows none."""
    if "strftime_now" not in template:
        return ""
    given = config.date or earlier or datetime.date.today().isoformat()
    try:
        return datetime.date.fromisoformat(given).isoformat()
    except ValueError:
        raise UserError(f"--date {given}: write it as 2026-01-31") from None


def rows_of_texts(
    batches: Iterable[pa.RecordBatch], encoder: PretrainEncoder, packer: Packer, column: str = "text"
) -> Iterator[pa.RecordBatch]:
    """Arrow batches with a text column to Arrow batches of rows: the command without its files, for `mapInArrow`.

    Null and empty texts are passed over; each call packs its own split.
    """
    for batch in batches:
        texts = [text for text in batch.column(column).to_pylist() if text and not text.isspace()]
        if texts:
            encoder.engine.check(texts, parse_special=encoder.parse_special)
            rows = packer.feed(encoder.documents(texts))
            if rows is not None:
                yield rows
    yield from packer.finish()
