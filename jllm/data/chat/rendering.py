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
text whose roles have been seen before are filled into what the template made of those roles, where it is shown to
leave texts as they are (`probing.py`); every 128th is rendered as well and must be equal, or the run starts over
without this short cut (`ShortCutError`).
Cost: about 20 MB/s of JSON on one core for plain conversations; 5 to 10 MB/s where Jinja runs for each.
"""

import dataclasses
import datetime
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jllm.data.chat.formats import BadRecordError, Conversation
from jllm.data.chat.marks import (
    CALL,
    CLOSE,
    END,
    FIRST_STAND_IN,
    LAST_STAND_IN,
    MARKS,
    OPEN,
    PRIVATE,
    START,
    StandIns,
    control_pattern,
    mapped,
    token_pattern,
    with_marks,
)
from jllm.data.chat.probes import probes_of
from jllm.data.chat.segments import Builder, Flat, Markup, Piece, drop_spans, flatten
from jllm.data.chat.short_cut import Form, form_of
from jllm.data.chat.template import compile_template
from jllm.data.chat.tool_calls import WITH_A_CALL, calls_as
from jllm.errors import UserError

_VERIFY_EVERY = 128
_FORMS_KEPT = 4096
_PLAIN = "\"'-#*(^:.!?$&\\"
"""What a plain text may begin with beside letters and digits: marks that no template gives a meaning to."""


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


class Renderer:
    """See the module. Not shared between threads."""

    def __init__(self, plan: RenderPlan) -> None:
        self.plan = plan
        self._template: Any = None
        self._count = 0
        # None where the template does not show texts as they are.
        self._forms: dict[tuple[Any, ...], Form | None] = {}
        self._shown: dict[frozenset[tuple[str, bool]], bool] = {}
        added = [token for token in plan.added if token["content"]]
        self.markup = Markup(
            ids={token["content"]: token["id"] for token in added},
            control=control_pattern(added),
            marked=bool(re.search(r"\{%-?\s*generation\s*-?%\}", plan.template)),
        )
        # White space that is a token stays as it is: templates trim it, which they could not do to a stand-in.
        visible = [token for token in added if token["content"].strip()]
        emitted = [token["content"] for token in visible if not token["special"] and token["content"] in plan.template]
        special = [token["content"] for token in visible if token["special"]]
        self._user_hidden = token_pattern(special + emitted)
        self._answer_hidden = token_pattern(special)
        # What a template may look for in a text: tags, its own tokens. Such texts do not take the short cut.
        self._unusual = re.compile(f"[<{PRIVATE}]|" + token_pattern([token["content"] for token in added]).pattern)
        self._tags_only = all(token["content"].startswith("<") for token in added)
        if self._tags_only:
            self._unusual = re.compile(f"[<{PRIVATE}]")

    def begin_block(self) -> None:
        """Count conversations from 0: which of them are verified must not depend on who renders which block."""
        self._count = 0

    @property
    def template(self) -> Any:
        if self._template is None:
            self._template = compile_template(self.plan.template, datetime.date.fromisoformat(self.plan.date))
            if not self.markup.marked:
                self._learn()
        return self._template

    @functools.cached_property
    def _probes(self) -> list[str]:
        """Plain texts that show whether the template treats texts in its own way."""
        return [text for text in probes_of(self.template.environment, self.plan.template) if self._is_plain_text(text)]

    def render(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None) -> str:
        """The text that the template makes of messages.

        Raises:
            BadRecordError: the template refuses them.
        """
        if any(message.get("tool_calls") for message in messages):
            messages = [calls_as(message, **self._form_of_calls) for message in messages]
        return self._render(messages, tools)

    @functools.cached_property
    def _form_of_calls(self) -> dict[str, bool]:
        """How the template wants tool calls, for `calls_as`: the first way in which it shows one."""
        function = {"name": "name_of_tool", "arguments": {"argument": "its_value"}}
        call = {"id": "call_0001", "type": "function", "function": function}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        rest = [
            {"role": "tool", "content": "result", "tool_call_id": "call_0001"},
            {"role": "assistant", "content": "b"},
        ]
        for as_text, without_content in itertools.product((False, True), repeat=2):
            form = {"as_text": as_text, "without_content": without_content}
            try:
                text = self._render([{"role": "user", "content": "a"}, calls_as(answer, **form), *rest], None)
            except BadRecordError:
                continue
            if "name_of_tool" in text and "its_value" in text:
                return form
        return {"as_text": False, "without_content": False}

    @functools.cached_property
    def _ends_calls(self) -> bool:
        """Whether an answer with a tool call ends before the tool answers. DeepSeek's template forgets the end where
        there is one call, and the tool's words would be trained on."""
        messages = [with_marks(each) if each["role"] == "assistant" else each for each in WITH_A_CALL]
        builder = Builder(self.markup, StandIns(), self.plan.train_on_prompt)
        pieces = builder.build(self.render(messages, None))
        return not any("result_of_tool" in piece.text[start:end] for piece in pieces for start, end in piece.spans)

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None) -> str:
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
        if min(start, end) < 0 or not asked < start < end:  # the question may be shown in part
            raise UserError(
                "--chat_template: the answer of an assistant does not come out of the template; mark it with"
                " {% generation %} ... {% endgeneration %}"
            )
        ends = set()
        for behind in map(_without_marks, text.split(END)[1:]):
            following = self.markup.control.match(behind, len(behind) - len(behind.lstrip()))
            if following:
                ends.add(self.markup.id_of(following.group()))
        self.markup.ends_of_turn = frozenset(ends)
        header = _without_marks(text[asked + 1 : start])
        last = max(self.markup.control.finditer(header), key=lambda match: match.start(), default=None)
        self.markup.header = (
            (self.markup.id_of(last.group()), header[last.end() :]) if last is not None else (None, header)
        )

    def unmarked_end_of_turn(self) -> str | None:
        """The token that the template writes behind an answer and leaves out of what it marks as generated; None
        where the marks take it in, or there are none."""
        if not self.markup.marked or self.plan.train_on_prompt:
            return None
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            text = self.render(messages, None)
        except BadRecordError:  # a template for other conversations, of which nothing is known here
            return None
        marked, closed, behind = text.rpartition(CLOSE)
        last = max(
            self.markup.control.finditer(marked.rpartition(OPEN)[2]), key=lambda match: match.end(), default=None
        )
        if not closed or (last is not None and not last.string[last.end() :].strip()):
            return None
        following = self.markup.control.match(behind.lstrip())
        return following.group().strip() if following else None

    def flat(self, conversation: Conversation) -> tuple[Flat, str | None]:
        """A conversation's pieces; and its rendered text, where nothing in the data had to be hidden.

        Raises:
            BadRecordError: the template refuses it, or an answer does not come out of the template.
        """
        if conversation.completion is not None:
            return flatten(self._completion(*conversation.completion)), None
        trained = list(conversation.trained)
        if self.plan.train_on == "last":
            last = max(index for index, counts in enumerate(trained) if counts)
            trained = [index == last for index in range(len(trained))]
        self._count += 1
        if self.plan.short_cut and self._is_plain(conversation):
            return self._filled(conversation, trained)
        return self._rendered(conversation, trained)

    def _rendered(self, conversation: Conversation, trained: list[bool]) -> tuple[Flat, str | None]:
        stand_ins = StandIns()
        hidden = [self._hide(message, stand_ins) for message in conversation.messages]
        tools = mapped(conversation.tools, lambda text: stand_ins.hide(text, self._user_hidden))
        if self.markup.marked or self.plan.train_on_prompt:
            text = self.render(hidden, tools)
        else:
            text = self._render_with_marks(hidden, trained, tools)
        pieces = self._built(text, stand_ins, hidden, trained)
        return flatten(pieces), None if stand_ins.used else _without_marks(text)

    def _built(
        self, text: str, stand_ins: "StandIns", messages: list[dict[str, Any]], trained: list[bool]
    ) -> list[Piece]:
        builder = Builder(self.markup, stand_ins, self.plan.train_on_prompt)
        pieces = builder.build(text)
        if self.markup.marked and not self.plan.train_on_prompt:
            answers = [counts for counts, given in zip(trained, messages, strict=True) if given["role"] == "assistant"]
            if not all(answers):
                drop_spans(builder.marked, answers)
        return pieces

    # The short cut.

    def _is_plain(self, conversation: Conversation) -> bool:
        """Whether no template has a reason to treat this conversation otherwise than others with the same roles."""
        if conversation.tools is not None:
            return False
        is_plain = self._is_plain_text
        return all(len(message) == 2 and is_plain(message["content"]) for message in conversation.messages)

    def _is_plain_text(self, text: str) -> bool:
        first = text[:1]
        if not first or text[-1:].isspace() or not (first.isalnum() or first in _PLAIN):
            return False
        # One character is found ten times faster than one of several, and there is no other one in ASCII.
        return not ("<" in text if self._tags_only and text.isascii() else self._unusual.search(text))

    def _shows_texts(self, conversation: Conversation, trained: list[bool], form: Form) -> bool:
        """Whether the template shows texts as they are, whatever is in them, in messages of these roles: tried once
        for each set of roles, with the probes as the texts of a conversation."""
        roles = frozenset(zip((message["role"] for message in conversation.messages), trained, strict=True))
        if roles not in self._shown:
            self._shown[roles] = all(self._shows(text, conversation, trained, form) for text in self._probes)
        return self._shown[roles]

    def _shows(self, text: str, conversation: Conversation, trained: list[bool], form: Form) -> bool:
        messages = [{**message, "content": text} for message in conversation.messages]
        try:
            shown, _ = self._rendered(dataclasses.replace(conversation, messages=messages), trained)
        except BadRecordError:
            return False
        return shown == form.filled([text] * len(messages))

    def _filled(self, conversation: Conversation, trained: list[bool]) -> tuple[Flat, str | None]:
        key = (*trained, *[message["role"] for message in conversation.messages])
        if key not in self._forms:
            if len(self._forms) > _FORMS_KEPT:
                self._forms.clear()
            learned = self._form_of(conversation, trained)
            self._forms[key] = learned if self._shows_texts(conversation, trained, learned) else None
        form = self._forms[key]
        if form is None:
            return self._rendered(conversation, trained)
        flat = form.filled([message["content"] for message in conversation.messages])
        whole = None
        if self._count % _VERIFY_EVERY == 1:
            wanted, whole = self._rendered(conversation, trained)
            if wanted != flat:
                raise ShortCutError("the template treats texts in its own way")
        return flat, whole

    def _form_of(self, conversation: Conversation, trained: list[bool]) -> Form:
        """What the template makes of these roles, with gaps where the texts go."""
        stand_ins = StandIns()
        messages = []
        for number, message in enumerate(conversation.messages):
            if number > LAST_STAND_IN - FIRST_STAND_IN:
                raise BadRecordError("wrong type", "too many messages in one conversation")
            gap = chr(FIRST_STAND_IN + number)
            stand_ins.used[gap] = gap
            messages.append({"role": message["role"], "content": f"a{gap}a"})
        if self.markup.marked or self.plan.train_on_prompt:
            text = self.render(messages, None)
        else:
            text = self.render(
                [with_marks(message) if counts else message for message, counts in zip(messages, trained, strict=True)],
                None,
            )
        return form_of(self._built(text, stand_ins, messages, trained))

    def _hide(self, message: dict[str, Any], stand_ins: "StandIns") -> dict[str, Any]:
        pattern = self._answer_hidden if message["role"] == "assistant" else self._user_hidden
        content = message["content"]
        if len(message) == 2:
            return message if not pattern.search(content) else {**message, "content": stand_ins.hide(content, pattern)}
        hidden: dict[str, Any] = mapped(message, lambda text: stand_ins.hide(text, pattern))
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
            shown.append(with_marks(message))
        text = self.render(shown, tools)
        calls = sum(
            len(message.get("tool_calls") or ()) for message, counts in zip(messages, trained, strict=True) if counts
        )
        if text.count(CALL) < calls:
            raise BadRecordError("tool call not found", "the template does not show a tool call of an answer")
        if calls and not self._ends_calls:
            raise BadRecordError("template error", "the template does not end an answer that calls a tool")
        if not careful:
            return text
        bare = self.render(messages, tools)
        return text if _without_marks(text) == bare else self._looked_up(bare, messages, trained)

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


def _without_marks(text: str) -> str:
    return MARKS.sub("", text)
