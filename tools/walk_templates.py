"""Walk all tokenizers at hand and all built-in templates, and write what becomes of conversations: docs/templates.md.

Each case (a system message, tools, calls in parallel, reasoning, ...) is encoded by jllm and rendered by transformers'
`apply_chat_template`; the ids must be equal, or the record refused by name. Takes a minute.

    python tools/walk_templates.py            the tokenizers of $JLLM_ASSETS; exit code 1 if something differs
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.data.chat.template_walk import section, walk  # noqa: E402
from tests.data.tokenizers_for_tests import asset_tokenizers  # noqa: E402

TARGET = ROOT / "docs" / "templates.md"
HEAD = """\
# Chat templates

Written by `make templates`, below the line. The built-in templates (`--chat_template NAME`) are the formats that their
families publish, with marks around what is trained on:

| name | the format of | shows beside questions and answers |
| --- | --- | --- |
| chatml | ChatML, with the tools of Qwen and Hermes | system, tools, calls, results |
| qwen2.5 | Qwen2.5-Instruct | the same, and its own system text where there is none |
| qwen3 | Qwen3, equal to its tokenizer's template in all that it shows | the same, and reasoning |
| llama-2 | Llama-2-chat | system |
| llama-3 | Meta-Llama-3-Instruct | system |
| llama-3.1 | Llama-3.1 and 3.2-Instruct, with the date of `--date` | system, tools, one call at a time, results |
| mistral | Mistral-7B-Instruct v0.1 and v0.2, the system text in the first question | system |
| gemma | gemma-3-it, the system text in the first question | system |
| phi-3 | Phi-3-mini and Phi-3.5 | system |
| tulu-2 | tulu-2 | system |
| zephyr | zephyr-7b-beta | system |
| vicuna | FastChat's vicuna v1.1, and its own system text where there is none | system |

What a format has no place for is refused by name, never left out: see the tables. Formats that take questions and
answers in turn refuse others. A template that runs for more than ten seconds of processor time on one conversation is
stopped: the record is bad (`template takes too long`), or the run is refused where a question and its answer take as
long.

**Named templates.** A tokenizer may have several (a list in `tokenizer_config.json`, or `additional_chat_templates/`).
As in transformers, `tool_use` is taken for conversations with tools, `default` for all others; `--chat_template NAME`
takes one of them for all.

## How it was found out

*equal*: the ids are those of the text that transformers' `apply_chat_template` makes of the same messages. *joined*:
messages of one role in a row were joined before. *as system*: a developer message was given to the template as a system
message. *without*: what the template leaves out; for reasoning of earlier turns that is the published format.
*refused*: the record is bad, for one of the reasons below the table.

---

"""


def main() -> int:
    """Write the document; 1 where something differs, or there is nothing to walk over."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    folders = asset_tokenizers()
    if not folders:
        print("no tokenizers at hand: set JLLM_ASSETS, and bring them with: make assets", file=sys.stderr)
        return 1
    found = {folder: walk(folder) for folder in folders}
    TARGET.write_text(HEAD + "\n".join(section(*each) for each in found.items()), encoding="utf-8")
    differing = [
        f"{folder.name}, {template}: {case}"
        for folder, templates in found.items()
        for template, cases in templates.items()
        for case, outcome in cases.items()
        if outcome.result == "differs"
    ]
    print("\n".join(differing) or f"{TARGET}: nothing differs")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
