"""A conversation to the pieces that are encoded, and which parts of them are trained on.

The template is rendered once. What must be known about the rendered text travels through the template inside the
text, as private-use characters that are put into the messages and taken out of the result:

* where an answer starts and ends (unless the template itself marks it with `{% generation %}`);
* control tokens that stand in the data and must stay ordinary text. In the text of users, systems and tools these are
  the special tokens and those that the template itself emits; in answers only the special ones.

What is left of control tokens in the result was written by the template, or parsed in answers, and becomes ids; between
them lie pieces of ordinary text. Nothing is cut anywhere else, so ids are those of the whole text tokenized once.

Guarantees: where a template could treat marked text differently (empty or tagged content, tool calls), the text is
rendered without marks too and must be the same; where it is not, answers are looked up in it. Conversations of plain
text whose roles have been seen before are filled into what the template made of those roles; every 64th is rendered
as well and must be equal, or the run starts over without this short cut (`ShortCutError`).
Cost: about 20 MB/s of JSON on one core for plain conversations; 5 to 10 MB/s where Jinja runs for each.
"""

import dataclasses
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jllm.data.conversations import BadRecordError, Conversation
from jllm.errors import UserError

START, END, REASONING, CALL, OPEN, CLOSE = "\ue000", "\ue001", "\ue002", "\ue003", "\ue004", "\ue005"
_MARKS = re.compile("[\ue000-\ue005]")
_FIRST_STAND_IN = 0xE010
_LAST_STAND_IN = 0xF8FF
_PRIVATE = "\ue000-\uf8ff"
_THINK = re.compile(r"(\s*<think>\s*)(.*?)(\s*</think>\s*)", re.DOTALL)
_VERIFY_EVERY = 64
_FORMS_KEPT = 4096
_DICT_ATTRIBUTES = frozenset(dir(dict))
_SAFE_OF_TEXT = frozenset(
    ("startswith", "endswith", "strip", "lstrip", "rstrip", "split", "rsplit", "replace", "lower", "upper", "title")
)


_SAFE_OF_LOOPS = frozenset(
    ("index", "index0", "revindex", "revindex0", "first", "last", "length", "previtem", "nextitem")
)


@dataclasses.dataclass(slots=True)
class Piece:
    """A stretch of a conversation: a control token (`control` ≥ 0), or text that has no control token in it.

    `spans` are the trained parts of a text, in characters.
    """

    text: str = ""
    control: int = -1
    trained: bool = False
    spans: list[tuple[int, int]] = dataclasses.field(default_factory=list)


def compile_template(source: str, date: datetime.date) -> Any:
    """A chat template in the environment that templates are written for; `{% generation %}` leaves marks.

    Raises:
        UserError: the template is not valid.
    """
    import jinja2
    import jinja2.ext
    import jinja2.runtime
    import jinja2.sandbox
    from jinja2 import nodes

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012 - jinja2's own convention

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            around = [nodes.Output([nodes.TemplateData(mark)]) for mark in (OPEN, CLOSE)]
            return nodes.Scope([around[0], *body, around[1]]).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        options.setdefault("ensure_ascii", False)
        return json.dumps(value, **options)

    class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """The sandbox, with short cuts for what templates do all the time and what is always safe."""

        def getattr(self, obj: Any, attribute: str) -> Any:
            kind = type(obj)
            if kind is dict and attribute not in _DICT_ATTRIBUTES:
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
            if kind is str and attribute in _SAFE_OF_TEXT:
                return getattr(obj, attribute)
            if kind is jinja2.runtime.LoopContext and attribute in _SAFE_OF_LOOPS:
                return getattr(obj, attribute)
            return super().getattr(obj, attribute)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: date.strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"--chat_template: not a valid template: {error}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderPlan:
    """Everything that rendering needs, as plain data for worker processes.

    Attributes:
        template: the source of the template.
        special_tokens: name → text for the template.
        added: content → id, special, lstrip, rstrip of the tokenizer's added tokens.
        date: what `strftime_now` shows, as ISO text.
        train_on: "all" answers, or the "last".
        train_on_prompt: everything is trained on.
        prefix, eos_id: what stands around a prompt with completion.
        short_cut: fill plain conversations into what the template made of the same roles.
    """

    template: str
    special_tokens: dict[str, str]
    added: tuple[dict[str, Any], ...]
    date: str
    train_on: str = "all"
    train_on_prompt: bool = False
    prefix: tuple[int, ...] = ()
    eos_id: int | None = None
    short_cut: bool = True


class ShortCutError(Exception):
    """A template treats texts differently in a way that the short cut for plain conversations does not know."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Form:
    """A piece with gaps for the texts of messages.

    Attributes:
        fixed: the piece itself where it has no gap; shared by all conversations, never changed.
        parts: static text and numbers of messages, in turn.
        spans: trained parts: both ends as (static characters before it, messages of this piece before it).
    """

    fixed: Piece | None
    parts: tuple[str | int, ...] = ()
    spans: tuple[tuple[tuple[int, int], tuple[int, int]], ...] = ()

    def filled(self, texts: list[str]) -> Piece:
        """The piece with these texts of messages in its gaps."""
        parts = [part if type(part) is str else texts[part] for part in self.parts]  # type: ignore[index]
        if not self.spans:
            return Piece("".join(parts))
        lengths = [0]
        for part in self.parts:
            if type(part) is int:
                lengths.append(lengths[-1] + len(texts[part]))
        return Piece("".join(parts), spans=[(s + lengths[i], e + lengths[j]) for (s, i), (e, j) in self.spans])


class Renderer:
    """See the module. Not shared between threads."""

    def __init__(self, plan: RenderPlan) -> None:
        self.plan = plan
        self._template: Any = None
        self._count = 0
        self._forms: dict[tuple[Any, ...], list[_Form]] = {}
        added = [token for token in plan.added if token["content"]]
        self._ids = {token["content"]: token["id"] for token in added}
        emitted = [token["content"] for token in added if not token["special"] and token["content"] in plan.template]
        special = [token["content"] for token in added if token["special"]]
        self._user_hidden = _pattern(special + emitted)
        self._answer_hidden = _pattern(special)
        self._control = _control_pattern(added)
        # What a template may look for in a text: tags, its own tokens. Such texts do not take the short cut.
        self._unusual = re.compile(f"[<{_PRIVATE}]|" + _pattern([token["content"] for token in added]).pattern)
        if all(token["content"].startswith("<") for token in added):
            self._unusual = re.compile(f"[<{_PRIVATE}]")
        self.marked = bool(re.search(r"\{%-?\s*generation\s*-?%\}", plan.template))
        self.end_of_turn: int | None = None
        self._header: tuple[int | None, str] = (None, "")

    def begin_block(self) -> None:
        """Count conversations from 0: which of them are verified must not depend on who renders which block."""
        self._count = 0

    @property
    def template(self) -> Any:
        if self._template is None:
            self._template = compile_template(self.plan.template, datetime.date.fromisoformat(self.plan.date))
            if not self.marked:
                self._learn()
        return self._template

    def render(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None) -> str:
        """The text that the template makes of messages.

        Raises:
            BadRecordError: the template refuses them.
        """
        template = self.template
        try:
            text: str = template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=False, **self.plan.special_tokens
            )
        except Exception as error:  # templates are programs: they fail in every way
            raise BadRecordError("template error", f"{type(error).__name__}: {error}"[:200]) from None
        return text

    def _learn(self) -> None:
        """Find out how the template opens and ends an answer, from one that is rendered with marks."""
        messages = [
            {"role": "user", "content": f"{OPEN}question{CLOSE}"},
            {"role": "assistant", "content": f"{START}answer{END}"},
        ]
        try:
            text = self.render([*messages, *messages], None)
        except BadRecordError as error:
            raise UserError(f"--chat_template: fails on a question and its answer: {error}") from None
        asked, start, end = text.find(CLOSE), text.find(START), text.find(END)
        if min(asked, start, end) < 0 or not asked < start < end:
            raise UserError(
                "--chat_template: the answer of an assistant does not come out of the template; mark it with"
                " {% generation %} ... {% endgeneration %}"
            )
        following = self._control.match(text, end + 1 + len(text[end + 1 :]) - len(text[end + 1 :].lstrip()))
        self.end_of_turn = self._ids[following.group().strip()] if following else None
        header = text[asked + 1 : start]
        last = max(self._control.finditer(header), key=lambda match: match.start(), default=None)
        self._header = (self._ids[last.group().strip()], header[last.end() :]) if last is not None else (None, header)

    def unmarked_end_of_turn(self) -> str | None:
        """The token that the template writes behind an answer and leaves out of what it marks as generated; None
        where the marks take it in, or there are none."""
        if not self.marked or self.plan.train_on_prompt:
            return None
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            text = self.render(messages, None)
        except BadRecordError:  # a template for other conversations, of which nothing is known here
            return None
        marked, closed, behind = text.rpartition(CLOSE)
        last = max(self._control.finditer(marked.rpartition(OPEN)[2]), key=lambda match: match.end(), default=None)
        if not closed or (last is not None and not last.string[last.end() :].strip()):
            return None
        following = self._control.match(behind.lstrip())
        return following.group().strip() if following else None

    def pieces(self, conversation: Conversation) -> tuple[list[Piece], str | None]:
        """The pieces of a conversation; and its rendered text, where nothing in the data had to be hidden.

        Raises:
            BadRecordError: the template refuses it, or an answer does not come out of the template.
        """
        if conversation.completion is not None:
            return self._completion(*conversation.completion), None
        trained = list(conversation.trained)
        if self.plan.train_on == "last":
            last = max(index for index, counts in enumerate(trained) if counts)
            trained = [index == last for index in range(len(trained))]
        self._count += 1
        if self.plan.short_cut and self._is_plain(conversation):
            return self._filled(conversation, trained)
        return self._rendered(conversation, trained)

    def _rendered(self, conversation: Conversation, trained: list[bool]) -> tuple[list[Piece], str | None]:
        stand_ins = _StandIns()
        hidden = [self._hide(message, stand_ins) for message in conversation.messages]
        tools = _mapped(conversation.tools, lambda text: stand_ins.hide(text, self._user_hidden))
        if self.marked or self.plan.train_on_prompt:
            text = self.render(hidden, tools)
        else:
            text = self._render_with_marks(hidden, trained, tools)
        return self._built(text, stand_ins, hidden, trained), None if stand_ins.used else _MARKS.sub("", text)

    def _built(
        self, text: str, stand_ins: "_StandIns", messages: list[dict[str, Any]], trained: list[bool]
    ) -> list[Piece]:
        builder = _Builder(self, stand_ins, self.plan.train_on_prompt)
        pieces = builder.build(text)
        if self.marked and not self.plan.train_on_prompt:
            answers = [counts for counts, given in zip(trained, messages, strict=True) if given["role"] == "assistant"]
            if not all(answers):
                _drop_spans(builder.marked, answers)
        return pieces

    # The short cut.

    def _is_plain(self, conversation: Conversation) -> bool:
        """Whether no template has a reason to treat this conversation otherwise than others with the same roles."""
        if conversation.tools is not None:
            return False
        unusual = self._unusual.search
        for message in conversation.messages:
            content = message["content"]
            if len(message) != 2 or not content[:1].isalnum() or content[-1:].isspace() or unusual(content):
                return False
        return True

    def _filled(self, conversation: Conversation, trained: list[bool]) -> tuple[list[Piece], str | None]:
        texts = [message["content"] for message in conversation.messages]
        key = (*trained, *(message["role"] for message in conversation.messages))
        forms = self._forms.get(key)
        if forms is None:
            if len(self._forms) > _FORMS_KEPT:
                self._forms.clear()
            forms = self._forms[key] = self._forms_of(conversation, trained)
        pieces = [form.fixed or form.filled(texts) for form in forms]
        whole = None
        if self._count % _VERIFY_EVERY == 1:
            wanted, whole = self._rendered(conversation, trained)
            if wanted != pieces:
                raise ShortCutError("the template treats texts in its own way")
        return pieces, whole

    def _forms_of(self, conversation: Conversation, trained: list[bool]) -> list[_Form]:
        """What the template makes of these roles, with gaps where the texts go."""
        stand_ins = _StandIns()
        messages = []
        for number, message in enumerate(conversation.messages):
            if number > _LAST_STAND_IN - _FIRST_STAND_IN:
                raise BadRecordError("wrong type", "too many messages in one conversation")
            gap = chr(_FIRST_STAND_IN + number)
            stand_ins.used[gap] = gap
            messages.append({"role": message["role"], "content": f"a{gap}a"})
        if self.marked or self.plan.train_on_prompt:
            text = self.render(messages, None)
        else:
            text = self.render(
                [
                    _with_marks(message) if counts else message
                    for message, counts in zip(messages, trained, strict=True)
                ],
                None,
            )
        return [_form_of(piece) for piece in self._built(text, stand_ins, messages, trained)]

    def _hide(self, message: dict[str, Any], stand_ins: "_StandIns") -> dict[str, Any]:
        pattern = self._answer_hidden if message["role"] == "assistant" else self._user_hidden
        content = message["content"]
        if len(message) == 2:
            return message if not pattern.search(content) else {**message, "content": stand_ins.hide(content, pattern)}
        hidden: dict[str, Any] = _mapped(message, lambda text: stand_ins.hide(text, pattern))
        return hidden

    def _render_with_marks(self, messages: list[dict[str, Any]], trained: list[bool], tools: list[Any] | None) -> str:
        careful = self._count % _VERIFY_EVERY == 1
        shown = []
        for message, counts in zip(messages, trained, strict=True):
            if not counts:
                shown.append(message)
                continue
            content = message["content"]
            plain = len(message) == 2
            if not plain or not content[:1].isalnum() or "<" in content:
                careful = True
            shown.append(_with_marks(message))
        text = self.render(shown, tools)
        if not careful:
            return text
        bare = self.render(messages, tools)
        return text if _MARKS.sub("", text) == bare else self._looked_up(bare, messages, trained)

    def _looked_up(self, text: str, messages: list[dict[str, Any]], trained: list[bool]) -> str:
        """Marks put where the answers are found in a text that was rendered without marks."""
        parts, at = [], 0
        for message, counts in zip(messages, trained, strict=True):
            content = message["content"].strip()
            if not content:
                continue
            found = text.find(content, at)
            if found < 0 and counts and "</think>" in content:
                content = content.rsplit("</think>", 1)[1].strip()
                found = text.find(content, at)
            if found < 0:
                if counts:
                    raise BadRecordError("answer not found", "the template does not show an answer as it is")
                continue
            parts.append(text[at:found])
            parts.append(START + content + END if counts else content)
            at = found + len(content)
        return "".join([*parts, text[at:]])

    def _completion(self, prompt: str, completion: str) -> list[Piece]:
        """A prompt, a line end, its completion and end-of-text; the text has no control tokens."""
        if self.plan.eos_id is None:
            raise BadRecordError("template error", "the tokenizer has no end-of-text token")
        text = f"{prompt}\n{completion}"
        start = 0 if self.plan.train_on_prompt else len(prompt)
        pieces = [Piece(control=index) for index in self.plan.prefix]
        pieces.append(Piece(text=text, spans=[(start, len(text))]))
        return [*pieces, Piece(control=self.plan.eos_id, trained=True)]


class _StandIns:
    """Control tokens of the data, each replaced by a private-use character for the time of rendering."""

    def __init__(self) -> None:
        self.used: dict[str, str] = {}
        self._of: dict[str, str] = {}

    def hide(self, text: str, pattern: "re.Pattern[str]") -> str:
        return pattern.sub(self._stand_in, text)

    def _stand_in(self, match: "re.Match[str]") -> str:
        token = match.group()
        if token not in self._of:
            code = _FIRST_STAND_IN + len(self._of)
            if code > _LAST_STAND_IN:
                raise BadRecordError("wrong type", "too many different control tokens in one conversation")
            self._of[token] = chr(code)
            self.used[chr(code)] = token
        return self._of[token]


def _form_of(piece: Piece) -> _Form:
    parts: list[str | int] = []
    gaps: list[int] = []  # where in the text each gap starts; a gap is three characters: "a", its stand-in, "a"
    at = 0
    for match in re.finditer(f"a([{_PRIVATE}])a", piece.text):
        parts += [piece.text[at : match.start()], ord(match.group(1)) - _FIRST_STAND_IN]
        gaps.append(match.start())
        at = match.end()
    parts.append(piece.text[at:])

    def end_point(position: int) -> tuple[int, int]:
        before = sum(gap < position for gap in gaps)
        return position - 3 * before, before

    spans = tuple((end_point(start), end_point(end)) for start, end in piece.spans)
    kept = tuple(part for part in parts if part != "")
    return _Form(fixed=None if gaps else piece, parts=kept, spans=spans)


def _with_marks(message: dict[str, Any]) -> dict[str, Any]:
    """An answer with marks around what the assistant says; its outer white space stays outside of them."""
    content, marked = message["content"], dict(message)
    calls = message.get("tool_calls")
    thinking = _THINK.match(content) if "</think>" in content else None
    end = "" if calls else END
    if thinking:
        opened, reasoning, closed = thinking.groups()
        rest = content[thinking.end() :]
        if reasoning.strip():
            marked["content"] = f"{opened}{REASONING}{reasoning}{closed}{_around(rest, START, end)}"
        else:
            marked["content"] = f"{opened}{reasoning}{closed}{_around(rest, START, end)}"
    else:
        marked["content"] = _around(content, START, end)
    for key in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(message.get(key), str):
            marked[key] = _around(message[key], REASONING, "")
    if calls:
        marked["tool_calls"] = [
            {**call, "function": {**call["function"], "name": CALL + call["function"]["name"]}} for call in calls
        ]
    return marked


def _around(text: str, start: str, end: str) -> str:
    inner = text.strip()
    if not inner:
        return text
    before = len(text) - len(text.lstrip())
    return f"{text[:before]}{start}{inner}{end}{text[before + len(inner) :]}"


class _Builder:
    """Cuts one rendered text into pieces and follows the marks in it."""

    def __init__(self, renderer: Renderer, stand_ins: _StandIns, everything: bool) -> None:
        self.renderer = renderer
        self.stand_ins = stand_ins.used
        self.everything = everything
        self.marked: list[list[tuple[Piece, tuple[int, int] | None]]] = []

    def build(self, rendered: str) -> list[Piece]:
        ids, header = self.renderer._ids, self.renderer._header
        end_of_turn, stand_ins, everything = self.renderer.end_of_turn, self.stand_ins, self.everything
        pieces: list[Piece] = []
        text = Piece()
        parts: list[str] = []
        length = 0  # of the text piece so far
        since = 0 if everything else -1  # where in it training began; -1: not training
        ending = -1  # where in it an answer ended whose end of turn is yet to come
        at = 0
        group: list[tuple[Piece, tuple[int, int] | None]] = []

        def close_span(end: int) -> None:
            if 0 <= since < end:
                text.spans.append((since, end))
                group.append((text, (since, end)))

        for match in self.renderer._control.finditer(rendered):
            begin = match.start()
            if begin > at:
                parts.append(rendered[at:begin])
                length += begin - at
            at = match.end()
            found = match.group()
            mark = found if len(found) == 1 and "\ue000" <= found <= "\uf8ff" else ""
            if not mark:
                index = ids.get(found)
                if index is None:
                    index = ids[found.strip()]
                final = False
                if ending >= 0:
                    blank = not "".join(parts)[ending - length :].strip() if ending < length else True
                    final = index == end_of_turn and blank
                    close_span(length if final else ending)
                    since, ending = (-1, -1)
                else:
                    close_span(length)
                    # A turn with tool calls, or cut by its template, goes on to the end of the turn.
                    final = since >= 0 and not everything and not self.renderer.marked and index == end_of_turn
                trained = since >= 0 or final or everything
                if final:
                    since = -1
                if parts:
                    text.text = "".join(parts)
                    pieces.append(text)
                piece = Piece(control=index, trained=trained)
                if trained:
                    group.append((piece, None))
                pieces.append(piece)
                text, parts, length = Piece(), [], 0
                since = 0 if since >= 0 else -1
                continue
            if mark in stand_ins:
                parts.append(stand_ins[mark])
                length += len(stand_ins[mark])
            elif everything:
                continue
            elif mark in (START, OPEN):
                since = length if since < 0 else since
            elif mark == END:
                ending = length
                if end_of_turn is None:
                    close_span(length)
                    since, ending = -1, -1
            elif mark == CLOSE:
                close_span(length)
                since = -1
                self.marked.append(group)
                group = []
            elif mark == REASONING and since < 0:
                since = self._back_over_think(pieces, "".join(parts), length)
            elif mark == CALL and since < 0:
                since = self._back_to_header(pieces, "".join(parts), length, header)
        if at < len(rendered):
            parts.append(rendered[at:])
            length += len(rendered) - at
        close_span(ending if ending >= 0 else length)
        if parts:
            text.text = "".join(parts)
            pieces.append(text)
        return pieces

    def _back_over_think(self, pieces: list[Piece], text: str, length: int) -> int:
        """Training begins with the tag that opens the reasoning, which the template has just written."""
        if not text.strip() and pieces and pieces[-1].control == self.renderer._ids.get("<think>", -2):
            pieces[-1].trained = True
            return 0
        found = re.search(r"<think>\s*$", text)
        return found.start() if found else length

    def _back_to_header(self, pieces: list[Piece], text: str, length: int, header: tuple[int | None, str]) -> int:
        """Training begins behind the header of the turn: a turn that is tool calls only has no other mark."""
        control, tail = header
        if control is None:
            found = text.rfind(tail)
            return found + len(tail) if found >= 0 else length
        position = len(pieces) - 1
        while position >= 0 and pieces[position].control != control:
            position -= 1
        if position < 0:
            return length
        for index in range(position + 1, len(pieces)):
            piece = pieces[index]
            if piece.control >= 0:
                piece.trained = True
            else:
                piece.spans = [(len(tail) if index == position + 1 else 0, len(piece.text))]
        return len(tail) if position == len(pieces) - 1 else 0


def _drop_spans(marked: list[list[tuple[Piece, tuple[int, int] | None]]], answers: list[bool]) -> None:
    """Take back the training of the answers that do not count, in a template that marks answers itself.

    Raises:
        BadRecordError: the template marks more or fewer parts than there are answers.
    """
    if len(marked) != len(answers):
        raise BadRecordError(
            "template error", f"the template marks {len(marked)} parts, the record has {len(answers)} answers"
        )
    for group, counts in zip(marked, answers, strict=True):
        for piece, span in group if not counts else ():
            if span is None:
                piece.trained = False
            else:
                piece.spans.remove(span)


def _mapped(value: Any, function: Any) -> Any:
    """`value` with every text in it replaced, keys included."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {function(key): _mapped(item, function) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, function) for item in value]
    return value


def _pattern(tokens: list[str]) -> "re.Pattern[str]":
    """Finds the longest of the tokens, and private-use characters."""
    return _scanner([(token, re.escape(token[1:])) for token in sorted(tokens, key=len, reverse=True)])


def _control_pattern(added: list[dict[str, Any]]) -> "re.Pattern[str]":
    """Finds added tokens as the tokenizer does, with the white space that some of them swallow, and marks."""
    ordered = sorted(added, key=lambda item: len(item["content"]), reverse=True)
    if not any(token.get("lstrip") or token.get("single_word") for token in added):
        return _scanner(
            [
                (token["content"], re.escape(token["content"][1:]) + (r"\s*" if token.get("rstrip") else ""))
                for token in ordered
            ]
        )
    options = []
    for token in ordered:
        text = re.escape(token["content"])
        if token.get("single_word"):
            text = rf"(?<!\w){text}(?!\w)"
        left, right = r"\s*" if token.get("lstrip") else "", r"\s*" if token.get("rstrip") else ""
        options.append(f"{left}{text}{right}")
    return re.compile("|".join([*options, f"[{_PRIVATE}]"]))


def _scanner(tokens: list[tuple[str, str]]) -> "re.Pattern[str]":
    """A pattern that starts with one set of characters, which `re` skips to some 20 times faster than to alternatives.

    Args:
        tokens: each token and the pattern of what follows its first character.
    """
    first: dict[str, list[str]] = {}
    for token, rest in tokens:
        first.setdefault(token[0], []).append(rest)
    starts = "".join(map(re.escape, first))
    branches = [f"(?<=[{_PRIVATE}])"]
    branches += [f"(?<={re.escape(character)})(?:{'|'.join(rests)})" for character, rests in first.items()]
    return re.compile(f"[{starts}{_PRIVATE}](?:{'|'.join(branches)})")
