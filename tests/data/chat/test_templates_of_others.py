"""Chat with templates and tokenizers that do unusual things: against what transformers makes of the whole text."""

from pathlib import Path

import pytest
import tokenizers

from tests.data.chats import END, TURNS, assistant, chat_of, rendered, user, whole


def test_the_last_answer_ends_with_another_token(tmp_path: Path) -> None:
    template = TURNS + ("{{- message.content }}{{- '<|endoftext|>' if loop.last else '<|im_end|>' }}{%- endfor %}")
    chat = chat_of(tmp_path, template)
    assert chat.trained([user("q"), assistant("one"), user("r"), assistant("two")]) == "one<|im_end|>two<|endoftext|>"
    assert chat.trained([user("q"), assistant("one")]) == "one<|endoftext|>"


def test_line_ends_that_are_tokens(tmp_path: Path) -> None:
    """As in Gemma: the header of a turn ends with one, texts hold some, and the template trims them."""
    lines = [tokenizers.AddedToken("\n" * count, special=False, normalized=False) for count in (1, 2)]
    chat = chat_of(tmp_path, TURNS + "{{- message.content | trim }}" + END, *lines)
    messages = [user("one\n\ntwo\n"), assistant("three\nfour")]
    ids, labels, bad = chat.encode([{"messages": messages}])
    assert not bad
    assert whole(chat, ids[0], rendered(messages, str.strip))
    assert chat.decode(labels[0]) == "three\nfour<|im_end|>"


@pytest.mark.parametrize("marked", [True, False])
def test_tokens_that_swallow_white_space(tmp_path: Path, marked: bool) -> None:
    """A mark of the template stands inside of what the token swallows."""
    ending = tokenizers.AddedToken("<|end|>", special=True, normalized=False, rstrip=True)
    opened, closed = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    template = (
        TURNS + "{% if message.role == 'assistant' %}" + opened + "{{- message.content + '<|end|>' }}" + closed
        + "{% else %}{{- message.content + '<|end|>' }}{% endif %}{{- '\\n' }}{% endfor %}"
    )  # fmt: skip
    chat = chat_of(tmp_path, template, ending)
    messages = [user("q"), assistant("a b"), user("r"), assistant("c")]
    ids, labels, bad = chat.encode([{"messages": messages}])
    assert not bad
    assert whole(chat, ids[0], rendered(messages, end="<|end|>"))
    assert chat.decode(labels[0]) == "a b<|end|>c<|end|>"


def test_white_space_around_answers(tmp_path: Path) -> None:
    """What a template shows of it is part of the answer; what it trims is not there."""
    messages = [user("q"), assistant("\tcode()\n"), user("r"), assistant("\n\nx")]
    chat = chat_of(tmp_path / "as it is", TURNS + "{{- message.content }}" + END)
    assert chat.trained(messages) == "\tcode()\n<|im_end|>\n\nx<|im_end|>"
    chat = chat_of(tmp_path / "trimmed", TURNS + "{{- message.content | trim }}" + END)
    assert chat.trained(messages) == "code()<|im_end|>x<|im_end|>"


def test_a_template_that_shows_messages_twice(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, TURNS + "{{- message.content + ' ' + message.content }}" + END)
    ids, _, bad = chat.encode([{"messages": [user("q"), assistant("yes")]}])
    assert not bad
    assert whole(chat, ids[0], rendered([user("q q"), assistant("yes yes")]))
