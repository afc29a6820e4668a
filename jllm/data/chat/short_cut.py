"""Conversations to segments, plain ones by a short cut: their texts are filled into what the template made of the same
roles once.

A conversation is plain where no template has a reason to treat it otherwise than others with the same roles. Whether
the template shows texts as they are is tried with texts that bring out what templates do with them (`probes.py`).

Guarantees: every 128th conversation of a chunk is rendered as well and must be equal, or `ShortCutError` is raised:
then the run starts over without the short cut. Which ones are verified does not depend on who renders which chunk.
Cost: no template runs for most plain conversations; the probes are rendered once for each set of roles.
"""

import dataclasses
import functools
import re
from typing import Any

from jllm.data.chat.marks import FIRST_STAND_IN, LAST_STAND_IN, PRIVATE, StandIns, token_pattern, with_marks
from jllm.data.chat.probes import longest_probed, probes_of
from jllm.data.chat.records.conversation import BadRecordError, Conversation, ReadingStyle
from jllm.data.chat.rendering import Renderer, RenderPlan
from jllm.data.chat.segments import FlatSegments, flatten
from jllm.data.chat.skeleton import Skeleton, skeleton_of

_VERIFY_EVERY = 128
_SKELETONS_KEPT = 4096
_PLAIN = "\"'-#*(^:.!?$&\\"
"""What a plain text may begin with beside letters and digits: marks that no template gives a meaning to."""


class ShortCutError(Exception):
    """A template treats texts differently in a way that the short cut for plain conversations does not know."""


class ConversationRenderer:
    """See the module. Not shared between threads."""

    def __init__(self, plan: RenderPlan) -> None:
        self.plan = plan
        self.renderer = Renderer(plan)
        self._count = 0
        # None where the template does not show texts as they are.
        self._skeletons: dict[tuple[Any, ...], Skeleton | None] = {}
        self._shown: dict[frozenset[tuple[str, bool]], bool] = {}
        added = [token["content"] for token in plan.added if token["content"]]
        # What a template may look for in a text: tags, its own tokens. Such texts do not take the short cut.
        self._tags_only = all(content.startswith("<") for content in added)
        tags = f"[<{PRIVATE}]"
        self._unusual = re.compile(tags if self._tags_only else f"{tags}|{token_pattern(added).pattern}")

    @property
    def style(self) -> ReadingStyle:
        """How records are read for this template."""
        return self.renderer.style

    def begin_chunk(self) -> None:
        """Count conversations from 0: which of them are verified must not depend on who renders which chunk."""
        self._count = 0

    def flat(self, conversation: Conversation) -> tuple[FlatSegments, str | None]:
        """A conversation's segments; and its rendered text, where nothing in the data had to be hidden, for some.

        Raises:
            BadRecordError: the template refuses it, or an answer does not come out of the template.
            ShortCutError: a verified conversation differs.
        """
        if conversation.completion is not None:
            return flatten(self.renderer.completion(*conversation.completion)), None
        trained = list(conversation.trained)
        if self.plan.train_on == "last":
            chosen = [index for index, counts in enumerate(trained) if counts]
            last = max(chosen, key=lambda index: (conversation.messages[index]["role"] == "assistant", index))
            trained = [index == last for index in range(len(trained))]
        self._count += 1
        if self.plan.train_on_prompt and any(conversation.refused):
            return self._rendered(conversation, trained)
        asks = not conversation.roles and any(
            counts and message["role"] != "assistant"
            for message, counts in zip(conversation.messages, trained, strict=True)
        )
        if self.plan.short_cut and not asks and self._is_plain(conversation):
            return self._filled(conversation, trained)
        return self._rendered(conversation, trained)

    @property
    def _verifies(self) -> bool:
        """Whether the conversation that is being rendered is one of those that are rendered twice."""
        return self._count % _VERIFY_EVERY == 1

    def _rendered(self, conversation: Conversation, trained: list[bool]) -> tuple[FlatSegments, str | None]:
        renderer = self.renderer if conversation.tools is None else self._for_tools
        return renderer.rendered(conversation, trained, careful=self._verifies)

    @functools.cached_property
    def _for_tools(self) -> Renderer:
        """What renders conversations with tools."""
        return self.renderer if self.plan.tools_template is None else Renderer(self.plan.for_tools)

    def _is_plain(self, conversation: Conversation) -> bool:
        if conversation.tools is not None:
            return False
        longest = self._longest
        if longest is not None and any(len(message["content"]) > longest for message in conversation.messages):
            return False
        is_plain = self._is_plain_text
        return all(len(message) == 2 and is_plain(message["content"]) for message in conversation.messages)

    def _is_plain_text(self, text: str) -> bool:
        first = text[:1]
        if not first or text[-1:].isspace() or not (first.isalnum() or first in _PLAIN):
            return False
        # One character is found ten times faster than one of several, and there is no other one in ASCII.
        return not ("<" in text if self._tags_only and text.isascii() else self._unusual.search(text))

    @functools.cached_property
    def _longest(self) -> int | None:
        return longest_probed(self.renderer.template.environment, self.plan.template)

    @functools.cached_property
    def _probes(self) -> list[str]:
        """Plain texts that show whether the template treats texts in its own way."""
        probes = probes_of(self.renderer.template.environment, self.plan.template)
        return [text for text in probes if self._is_plain_text(text)]

    def _filled(self, conversation: Conversation, trained: list[bool]) -> tuple[FlatSegments, str | None]:
        key = (*trained, *[message["role"] for message in conversation.messages])
        if key not in self._skeletons:
            if len(self._skeletons) > _SKELETONS_KEPT:
                self._skeletons.clear()
            self.renderer.completeness.thoughts_left_out(conversation.messages, None)
            learned = self._skeleton_of(conversation, trained)
            self._skeletons[key] = learned if self._shows_texts(conversation, trained, learned) else None
        skeleton = self._skeletons[key]
        if skeleton is None:
            return self._rendered(conversation, trained)
        flat = skeleton.filled([message["content"] for message in conversation.messages])
        whole = None
        if self._verifies:
            try:
                wanted, whole = self._rendered(conversation, trained)
            except BadRecordError as error:  # which no text that it shows as it is would be
                raise ShortCutError(f"the template treats texts in its own way: {error}") from None
            if wanted != flat:
                raise ShortCutError("the template treats texts in its own way")
        return flat, whole

    def _skeleton_of(self, conversation: Conversation, trained: list[bool]) -> Skeleton:
        """What the template makes of these roles, with gaps where the texts go."""
        renderer, stand_ins = self.renderer, StandIns()
        messages = []
        for number, message in enumerate(conversation.messages):
            if number > LAST_STAND_IN - FIRST_STAND_IN:
                raise BadRecordError("wrong type", "too many messages in one conversation")
            gap = chr(FIRST_STAND_IN + number)
            stand_ins.used[gap] = gap
            messages.append({"role": message["role"], "content": f"a{gap}a"})
        if renderer.needs_marks:
            shown = [with_marks(each) if counts else each for each, counts in zip(messages, trained, strict=True)]
            text = renderer.render(shown, None)
        else:
            text = renderer.render(messages, None)
        return skeleton_of(renderer.segments_of(text, stand_ins, messages, trained))

    def _shows_texts(self, conversation: Conversation, trained: list[bool], skeleton: Skeleton) -> bool:
        """Whether the template shows texts as they are, whatever is in them, in messages of these roles: tried once
        for each set of roles, with the probes as the texts of a conversation."""
        roles = frozenset(zip((message["role"] for message in conversation.messages), trained, strict=True))
        if roles not in self._shown:
            self._shown[roles] = all(self._shows(text, conversation, trained, skeleton) for text in self._probes)
        return self._shown[roles]

    def _shows(self, text: str, conversation: Conversation, trained: list[bool], skeleton: Skeleton) -> bool:
        messages = [{**message, "content": text} for message in conversation.messages]
        try:
            shown, _ = self._rendered(dataclasses.replace(conversation, messages=messages), trained)
        except BadRecordError:
            return False
        return shown == skeleton.filled([text] * len(messages))
