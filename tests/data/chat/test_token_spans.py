"""Which tokens lie in the spans that are trained on."""

from pathlib import Path

from tests.data.chats import assistant, chat_of, user


def test_spans_where_the_normalizer_keeps_the_length_of_the_whole(tmp_path: Path) -> None:
    """A letter that grows and letters that shrink under NFC: bytes add up, and tokens lie elsewhere all the same."""
    template = "{%- for message in messages %}{{- message.role + ': ' + message.content + ' ' }}{%- endfor %}"
    chat = chat_of(tmp_path, template)
    grows, shrinks = "\u0958 " * 2, "re\u0301sume\u0301 cafe\u0301 de\u0301ja\u0300 e\u0301"
    answer = chat.trained([user(f"{grows}here"), assistant(shrinks)])
    assert answer.strip() == "résumé café déjà é"
