"""A conversation to the segments that are encoded, and what of them is trained on.

The template is rendered once. What must be known about the rendered text travels through the template inside the
text, as private-use characters that are put into the messages and taken out of the result:

* where an answer starts and ends (unless the template itself marks it with `{% generation %}`);
* control tokens that stand in the data and must stay ordinary text. In the text of users, systems and tools these are
  the special tokens and those that the template itself emits; in answers only the special ones.

What is left of control tokens in the result was written by the template, or parsed in answers, and becomes ids; between
them lie segments of ordinary text. Nothing is cut anywhere else, so ids are those of the whole text tokenized once.

Guarantees: where a template could treat marked text differently (empty or tagged content, tool calls), the text is
rendered without marks too and must be the same; where it is not, answers are looked up in it.
Cost: Jinja runs for each conversation; `short_cut.py` spares most plain ones that.
"""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jllm.data.chat.completeness import Completeness
from jllm.data.chat.marks import (
    CALL,
    CLOSE,
    END,
    MARKS,
    OPEN,
    START,
    StandIns,
    control_pattern,
    mapped,
    token_pattern,
    with_marks,
)
from jllm.data.chat.probes import probes_of
from jllm.data.chat.records.conversation import LEFT_OUT, BadRecordError, Conversation, ReadingStyle, unused
from jllm.data.chat.segments import FlatSegments, Markup, Segment, SegmentBuilder, drop_spans, flatten, inverted
from jllm.data.chat.template import compile_template
from jllm.data.chat.tool_calls import SAMPLE_TOOLS, WITH_A_CALL, calls_as
from jllm.errors import UserError

TOO_SLOW = "template takes too long"
_PAIR: list[dict[str, Any]] = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderPlan:
    """Everything that rendering needs, as plain data for worker processes.

    Attributes:
        template: the source of the template.
        tools_template: that of the one for conversations with tools, where it is another; see `for_tools`.
        with_tools: all conversations have tools: the template may fail on others.
        named: what the template is called in messages.
        special_tokens: name → text for the template.
        added: content → id, special, lstrip, rstrip of the tokenizer's added tokens.
        date: what `strftime_now` shows, as ISO text.
        train_on: "all" answers, or the "last".
        train_on_prompt: everything is trained on.
        prefix, eos_id: what stands around a prompt with completion.
        short_cut: fill plain conversations into what the template made of the same roles.
        join, ignore_tools: how records are read; see `ReadingStyle`.
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
    join: str = "\n\n"
    ignore_tools: bool = False
    tools_template: str | None = None
    with_tools: bool = False
    named: str = "--chat_template"

    @property
    def for_tools(self) -> "RenderPlan":
        """The plan for conversations with tools."""
        if self.tools_template is None:
            return self
        return dataclasses.replace(self, template=self.tools_template, tools_template=None, with_tools=True)


class EndOfTurn(NamedTuple):
    """What ends an answer.

    Attributes:
        token: what the template writes behind it: a control token, or in its marks any text; None for nothing.
        trained: whether it is trained on.
    """

    token: str | None
    trained: bool


class Renderer:
    """See the module. Not shared between threads."""

    def __init__(self, plan: RenderPlan) -> None:
        self.plan = plan
        self._template: Any = None
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
        self.completeness = Completeness(self.render)
        self._sample_tools = SAMPLE_TOOLS if plan.with_tools else None

    @property
    def needs_marks(self) -> bool:
        """Whether answers are marked in the messages, because nothing else says where they are."""
        return not self.markup.marked and not self.plan.train_on_prompt

    @property
    def template(self) -> Any:
        if self._template is None:
            date = datetime.date.fromisoformat(self.plan.date)
            self._template = compile_template(self.plan.template, date, named=self.plan.named)
            with contextlib.suppress(*(UserError,) * self.markup.marked):  # its own marks say where answers are
                self._learn()
        return self._template

    @functools.cached_property
    def style(self) -> ReadingStyle:
        """How records are read for this template."""
        from jinja2 import nodes

        source = self.template.environment.parse(self.plan.template)
        names = {node.value for node in source.find_all(nodes.Const) if isinstance(node.value, str)}
        names |= {node.attr for node in source.find_all(nodes.Getattr)}
        return ReadingStyle(
            names=frozenset(names),
            developer_as_system="developer" not in names and not self._shows_developers,
            join=self.plan.join,
            ignore_tools=self.plan.ignore_tools,
        )

    @property
    def _shows_developers(self) -> bool:
        """Whether the template writes the role of any message as it is called."""
        said = [{"role": "developer", "content": f"{OPEN}rule"}, {"role": "user", "content": "question"}]
        try:
            text = self.render([*said, {"role": "assistant", "content": "answer"}], None)
        except BadRecordError:
            return False
        return "developer" in text and f"{OPEN}rule" in text

    def render(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None) -> str:
        """The text that the template makes of messages.

        Raises:
            BadRecordError: the template refuses them.
        """
        if any(message.get("tool_calls") for message in messages):
            messages = [calls_as(message, **self._style_of_calls) for message in messages]
        return self._render(messages, tools)

    @functools.cached_property
    def _style_of_calls(self) -> dict[str, bool]:
        """How the template wants tool calls, for `calls_as`: the first way in which it shows one."""
        function = {"name": "name_of_tool", "arguments": {"argument": "its_value"}}
        call = {"id": "call_0001", "type": "function", "function": function}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        rest = [
            {"role": "tool", "content": "result", "tool_call_id": "call_0001"},
            {"role": "assistant", "content": "b"},
        ]
        for as_text, without_content in itertools.product((False, True), repeat=2):
            style = {"as_text": as_text, "without_content": without_content}
            try:
                said = [{"role": "user", "content": "a"}, calls_as(answer, **style), *rest]
                text = self._render(said, self._sample_tools)
            except BadRecordError:
                continue
            if "name_of_tool" in text and "its_value" in text:
                return style
        return {"as_text": False, "without_content": False}

    @functools.cached_property
    def _ends_calls(self) -> bool:
        """Whether an answer with a tool call ends before the tool answers. DeepSeek's template forgets the end where
        there is one call, and the tool's words would be trained on."""
        messages = [with_marks(each) if each["role"] == "assistant" else each for each in WITH_A_CALL]
        builder = SegmentBuilder(self.markup, StandIns(), everything=False)
        segments = builder.build(self.render(messages, self._sample_tools))
        return not any("result_of_tool" in each.text[start:end] for each in segments for start, end in each.spans)

    @functools.cached_property
    def _minds_marks(self) -> bool:
        """Whether the template compares texts with others, and marks in them make a difference: seen by the probes that
        look like any text."""
        for text in probes_of(self.template.environment, self.plan.template):
            if "<" in text or not text[:1].isalnum() or text[-1:].isspace():
                continue
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
            try:
                shown, bare = (
                    self.render([messages[0], each], self._sample_tools)
                    for each in (with_marks(messages[1]), messages[1])
                )
            except BadRecordError:
                continue
            if _without_marks(shown) != bare:
                return True
        return False

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None) -> str:
        template = self.template
        template.environment.limit.begin((messages, tools))
        try:
            text: str = template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=False, **self.plan.special_tokens
            )
        except TimeoutError as error:
            raise BadRecordError(TOO_SLOW, f"{error}") from None
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
            text = self.render([*messages, *messages], self._sample_tools)
        except BadRecordError as error:
            raise UserError(f"{self.plan.named}: fails on a question and its answer: {error}") from None
        asked, start, end = text.find(CLOSE), text.find(START), text.find(END)
        if min(start, end) < 0 or not asked < start < end:  # the question may be shown in part
            raise UserError(
                f"{self.plan.named}: the answer of an assistant does not come out of the template; mark it with"
                " {% generation %} ... {% endgeneration %}"
            )
        ends = set()
        for behind in map(_without_marks, text.split(END)[1:]):
            following = self.markup.control.match(behind, len(behind) - len(behind.lstrip()))
            if following:
                ends.add(self.markup.id_of(following.group()))
        self.markup.ends_of_turn = frozenset(ends)
        opened = [part.rpartition(CLOSE)[2] for part in text.split(START)[:-1]]
        headers = [self._header(_without_marks(part)) for part in opened]
        self.markup.header, self.markup.headers = headers[0], tuple(dict.fromkeys(headers))

    def _header(self, text: str) -> tuple[int | None, str]:
        """The last control token in a text, and what is behind it."""
        last = max(self.markup.control.finditer(text), key=lambda match: match.start(), default=None)
        return (self.markup.id_of(last.group()), text[last.end() :]) if last is not None else (None, text)

    def check(self) -> None:
        """Find out whether the template is one.

        Raises:
            UserError: it is not valid, does not end, or answers do not come out of it.
        """
        try:
            self.render(_PAIR, self._sample_tools)
        except BadRecordError as error:  # or it is a template for other conversations, of which nothing is known here
            if error.kind == TOO_SLOW:
                raise UserError(f"{self.plan.named}: fails on a question and its answer: {error}") from None

    def end_of_turn(self) -> EndOfTurn | None:
        """What ends an answer; None where the template refuses a question and its answer."""
        marked = self.markup.marked
        try:
            text = self.render(_PAIR if marked else [_PAIR[0], with_marks(_PAIR[1])], self._sample_tools)
        except BadRecordError:
            return None
        answer, _, behind = text.rpartition(CLOSE if marked else END)
        written = answer.rpartition(_PAIR[1]["content"])[2].strip() if marked else ""
        if written:  # in the marks, be it a token of this tokenizer or a text
            return EndOfTurn(written, trained=True)
        following = self.markup.control.match(behind.lstrip())
        token = following.group().strip() if following else None
        return EndOfTurn(token, trained=token is not None and (not marked or self.plan.train_on_prompt))

    def rendered(
        self, conversation: Conversation, trained: list[bool], *, careful: bool
    ) -> tuple[FlatSegments, str | None]:
        """A conversation's segments; and its rendered text, where nothing in the data had to be hidden.

        Args:
            trained: for each message, whether it is an answer to train on.
            careful: render without marks too, also where nothing speaks for a difference.

        Raises:
            BadRecordError: the template refuses it, or something does not come out of the template.
        """
        stand_ins = StandIns()
        hidden = [self._hide(message, stand_ins) for message in conversation.messages]
        tools = mapped(conversation.tools, lambda text: stand_ins.hide(text, self._user_hidden))
        but = self.plan.train_on_prompt and any(conversation.refused)
        if but:
            text = self._render_refused(hidden, conversation.refused, tools)
        elif self.needs_marks:
            text = self._render_with_marks(hidden, trained, tools, careful)
        elif any(asked := _beside_answers(hidden, trained)) and not self.plan.train_on_prompt:
            text = self._render_with_marks(hidden, asked, tools, careful=True)
        else:
            text = self.render(hidden, tools)
        bare = _without_marks(text)
        left_out = self.completeness.thoughts_left_out(hidden, tools)
        changed = self.completeness.require_in(bare, hidden, tools, left_out)
        if but:
            segments = inverted(self.segments_of(text, stand_ins, hidden, conversation.refused, everything=False))
        else:
            segments = self.segments_of(text, stand_ins, hidden, trained)
        if left_out:
            conversation.note(f"{LEFT_OUT}reasoning of earlier turns, by the template", len(left_out))
        # Where the template does not speak of names, they were counted when they were read.
        named = "name" in self.style.names and any("name" in message for message in hidden)
        if named and (unseen := self.completeness.names_left_out(hidden, tools)):
            conversation.note(unused("name of messages"), unseen)
        if changed:
            conversation.note(f"{LEFT_OUT}text of messages that the template cuts or replaces", changed)
        return flatten(segments), None if stand_ins.used else bare

    def _render_refused(self, messages: list[dict[str, Any]], refused: list[bool], tools: list[Any] | None) -> str:
        """The text with marks around what a flag takes out of all that is trained on."""
        if not self.markup.marked:
            return self._render_with_marks(messages, refused, tools, careful=True)
        return self._render_with_marks(messages, _beside_answers(messages, refused), tools, careful=True)

    def segments_of(
        self,
        text: str,
        stand_ins: StandIns,
        messages: list[dict[str, Any]],
        trained: list[bool],
        *,
        everything: bool | None = None,
    ) -> list[Segment]:
        """The segments of a rendered text; `stand_ins` are those of the messages that it was made of."""
        everything = self.plan.train_on_prompt if everything is None else everything
        builder = SegmentBuilder(self.markup, stand_ins, everything)
        segments = builder.build(text)
        if self.markup.marked and not everything:
            answers = [counts for counts, given in zip(trained, messages, strict=True) if given["role"] == "assistant"]
            if not all(answers):
                drop_spans(builder.marked, answers)
        return segments

    def _hide(self, message: dict[str, Any], stand_ins: StandIns) -> dict[str, Any]:
        pattern = self._answer_hidden if message["role"] == "assistant" else self._user_hidden
        content = message["content"]
        if len(message) == 2:
            return message if not pattern.search(content) else {**message, "content": stand_ins.hide(content, pattern)}
        hidden: dict[str, Any] = mapped(message, lambda text: stand_ins.hide(text, pattern))
        return hidden

    def _render_with_marks(
        self, messages: list[dict[str, Any]], trained: list[bool], tools: list[Any] | None, careful: bool
    ) -> str:
        edges, careful = False, careful or self._minds_marks
        for message, counts in zip(messages, trained, strict=True):
            if counts:
                content = message["content"]
                edges = edges or content[:1].isspace() or content[-1:].isspace()
                careful = careful or len(message) != 2 or not content[:1].isalnum() or "<" in content
        calls = sum(
            len(message.get("tool_calls") or ()) for message, counts in zip(messages, trained, strict=True) if counts
        )
        text = self._marked(messages, trained, tools, tight=edges)
        bare = self.render(messages, tools) if careful or edges else None
        if edges and _without_marks(text) != bare:  # the template trims
            text = self._marked(messages, trained, tools)
        if text.count(CALL) < calls:
            raise BadRecordError("tool call not found", "the template does not show a tool call of an answer")
        if calls and not self._ends_calls:
            raise BadRecordError("template error", "the template does not end an answer that calls a tool")
        if bare is None or _without_marks(text) == bare:
            return text
        return self._looked_up(bare, messages, trained)

    def _marked(
        self, messages: list[dict[str, Any]], trained: list[bool], tools: list[Any] | None, *, tight: bool = False
    ) -> str:
        both = zip(messages, trained, strict=True)
        return self.render([with_marks(each, tight=tight) if counts else each for each, counts in both], tools)

    def _looked_up(self, text: str, messages: list[dict[str, Any]], trained: list[bool]) -> str:
        """Marks put where the answers are found in a text that was rendered without marks."""
        shown, at = [], 0
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
            shown.append(text[at:found])
            shown.append(START + content + END if counts else content)
            at = found + len(content)
        return "".join([*shown, text[at:]])

    def completion(self, prompt: str, completion: str) -> list[Segment]:
        """A prompt, a line end, its completion and end-of-text; the text has no control tokens.

        Raises:
            BadRecordError: the tokenizer has no end-of-text token.
        """
        if self.plan.eos_id is None:
            raise BadRecordError("template error", "the tokenizer has no end-of-text token")
        text = f"{prompt}\n{completion}"
        start = 0 if self.plan.train_on_prompt else len(prompt)
        segments = [Segment(control=index) for index in self.plan.prefix]
        segments.append(Segment(text=text, spans=[(start, len(text))]))
        return [*segments, Segment(control=self.plan.eos_id, trained=True)]


def _beside_answers(messages: Sequence[Mapping[str, Any]], chosen: list[bool]) -> list[bool]:
    """The chosen messages that a template with marks of its own does not mark."""
    return [is_one and message["role"] != "assistant" for message, is_one in zip(messages, chosen, strict=True)]


def _without_marks(text: str) -> str:
    return MARKS.sub("", text)
