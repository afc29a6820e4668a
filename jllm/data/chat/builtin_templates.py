"""Built-in chat templates, by name.

They write the formats that their model families publish; docs/templates.md says for each of them what it was held
against. Each marks what the assistant says, its end-of-turn token included, with `{% generation %}`. Use the
tokenizer's own template where it has one, unless you train a base model.

Guarantees: what a message has and the format cannot show (a role, tools, calls, reasoning) is refused by name; nothing
is left out silently but reasoning before the last question, as qwen3 publishes it.
Control tokens are written out, except begin- and end-of-text, which are the tokenizer's.
"""


def _limits(
    name: str,
    *roles: str,
    tools: bool = False,
    reasoning: bool = False,
    system_first: bool = False,
    turns: bool = False,
) -> str:
    """What refuses messages that a format cannot show.

    Args:
        roles: those that it has.
        tools: it shows tools, calls and their results; `roles` then have `tool`.
        reasoning: it shows reasoning.
        system_first: a system message is the first one.
        turns: questions and answers alternate.
    """

    def refusal(condition: str, what: str) -> str:
        return f"{{%- if {condition} %}}{{{{- raise_exception('the template {name} {what}) }}}}{{%- endif %}}\n"

    parts = [] if tools else [refusal("tools", "has no place for tools'")]
    parts.append("{%- for message in messages %}\n")
    parts.append(refusal(f"message.role not in {roles}", "has no role ' ~ message.role"))
    if system_first:
        parts.append(refusal("message.role == 'system' and not loop.first", "has a system message first of all only'"))
    if not tools:
        parts.append(refusal("message.tool_calls", "has no place for tool calls'"))
    if not reasoning:
        given = "message.reasoning_content or message.reasoning or message.thinking"
        parts.append(refusal(given, "has no place for reasoning'"))
    if turns:
        parts.append(
            "{%- if message.role != 'system' %}\n"
            "{%- set number = loop.index0 - (1 if messages[0].role == 'system' else 0) %}\n"
            + refusal("(message.role == 'user') != (number % 2 == 0)", "has questions and answers in turn only'")
            + "{%- endif %}\n"
        )
    return "".join([*parts, "{%- endfor %}\n"])


_QWEN_TOOLS = """\
{{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}
{{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
"""
_QWEN_THOUGHT = """\
{%- set reasoning, before = '', '' %}
{%- if message.reasoning_content is defined and message.reasoning_content is not none %}
    {%- set reasoning = message.reasoning_content %}
{%- elif '</think>' in content %}
    {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
    {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.index0 > asked.last and (loop.last or reasoning) %}
    {%- set content = content.lstrip('\\n') %}
    {%- set before = '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' %}
{%- endif %}
{%- if before and not reasoning.strip() %}{{- before }}{%- set before = '' %}{%- endif %}
"""
_QWEN_LAST_QUESTION = """\
{%- set asked = namespace(last=messages | length - 1) %}
{%- for message in messages %}
    {%- set text = message.content %}
    {%- if message.role == 'user' and not (text.startswith('<tool_response>') and text.endswith('</tool_response>')) %}
        {%- set asked.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
"""


def _chatml(name: str, *, system: str = "", reasoning: bool = False) -> str:
    """ChatML with the tools of Qwen and Hermes.

    Args:
        system: what the system says where a conversation has no system message.
        reasoning: show it as Qwen 3 does: in the answers that follow the last question.
    """
    spoken = "{{- '<|im_start|>system\\n" + system
    return (
        _limits(name, "system", "user", "assistant", "tool", tools=True, reasoning=reasoning)
        + "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content }}\n"
        + ("{%- else %}" + spoken + "' }}" if system else "{%- elif tools %}{{- '<|im_start|>system\\n' }}")
        + "{%- endif %}\n{%- if tools %}\n"
        + ("{{- '\\n\\n' }}\n" if system else "{%- if messages[0].role == 'system' %}{{- '\\n\\n' }}{%- endif %}\n")
        + _QWEN_TOOLS
        + ("{%- else %}" if system else "{%- elif messages[0].role == 'system' %}")
        + "{{- '<|im_end|>\\n' }}{%- endif %}\n"
        + (_QWEN_LAST_QUESTION if reasoning else "")
        + "{%- for message in messages %}{%- set content = message.content %}\n"
        "{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}\n"
        + (_QWEN_THOUGHT if reasoning else "{%- set before = '' %}\n")
        + "{%- generation %}{{- before + content }}\n"
        "{%- for call in message.tool_calls or [] %}{%- set call = call.function or call %}\n"
        "{%- if content or not loop.first %}{{- '\\n' }}{%- endif %}\n"
        "{{- '<tool_call>\\n{\"name\": \"' + call.name + '\", \"arguments\": ' }}\n"
        + ("{{- call.arguments if call.arguments is string else call.arguments | tojson }}" if reasoning
           else "{{- call.arguments | tojson }}")
        + "{{- '}\\n</tool_call>' }}{%- endfor %}\n"
        "{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}\n"
        "{%- elif message.role == 'tool' %}\n"
        "{%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}\n"
        "{{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}\n"
        "{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}\n"
        "{%- elif not (loop.first and message.role == 'system') %}\n"
        "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}\n"
        "{%- endif %}{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )  # fmt: skip


_LLAMA_3_ANSWER = """\
{%- if message.role == 'assistant' and not message.tool_calls %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
    {%- generation %}{{- message.content | trim }}{{- '<|eot_id|>' }}{%- endgeneration %}
"""
_LLAMA_3_PROMPT = """\
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
_LLAMA_3 = (
    _limits("llama-3", "system", "user", "assistant")
    + "{{- bos_token }}\n{%- for message in messages %}\n"
    + _LLAMA_3_ANSWER
    + """\
{%- else %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endif %}{%- endfor %}
"""
    + _LLAMA_3_PROMPT
)
_LLAMA_3_1 = (
    _limits("llama-3.1", "system", "user", "assistant", "tool", tools=True)
    + """\
{%- if strftime_now is defined %}{%- set today = strftime_now('%d %b %Y') %}
{%- else %}{%- set today = '26 Jul 2024' %}{%- endif %}
{{- bos_token }}{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + today + '\\n\\n' }}
{%- if messages[0].role == 'system' %}
    {{- messages[0].content | trim }}{%- set messages = messages[1:] %}
{%- endif %}
{{- '<|eot_id|>' }}
{%- for message in messages %}
"""
    + _LLAMA_3_ANSWER
    + """\
{%- elif message.role == 'assistant' %}
    {%- if message.tool_calls | length > 1 %}
        {{- raise_exception('the template llama-3.1 has one tool call at a time') }}
    {%- elif message.content | trim %}
        {{- raise_exception('the template llama-3.1 has no place for a text beside a tool call') }}
    {%- endif %}
    {%- set call = message.tool_calls[0].function or message.tool_calls[0] %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
    {%- generation %}{{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}
    {{- '}<|eot_id|>' }}{%- endgeneration %}
{%- elif message.role == 'tool' %}
    {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}{{- message.content | tojson }}{{- '<|eot_id|>' }}
{%- else %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if tools and loop.first %}
        {%- if message.role != 'user' %}
            {{- raise_exception('the template llama-3.1 shows tools in a question that comes first') }}
        {%- endif %}
        {{- 'Given the following functions, please respond with a JSON for a function call with its proper ' }}
        {{- 'arguments that best answers the given prompt.\\n\\nRespond in the format {"name": function name, ' }}
        {{- '"parameters": dictionary of argument name and its value}.Do not use variables.\\n\\n' }}
        {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}
    {%- endif %}
    {{- message.content | trim + '<|eot_id|>' }}
{%- endif %}{%- endfor %}
"""
    + _LLAMA_3_PROMPT
)

_SYSTEM_OFF = """\
{%- if messages[0].role == 'system' %}
    {%- set system, messages = messages[0].content, messages[1:] %}
{%- else %}{%- set system = none %}{%- endif %}
"""
_LLAMA_2 = (
    _limits("llama-2", "system", "user", "assistant", system_first=True, turns=True)
    + _SYSTEM_OFF
    + """\
{%- for message in messages %}
{%- if message.role == 'user' %}
    {%- set content = message.content %}
    {%- if loop.first and system is not none %}
        {%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content %}
    {%- endif %}
    {{- bos_token }}{{- '[INST] ' + content | trim + ' [/INST]' }}
{%- else %}
    {{- ' ' }}{%- generation %}{{- message.content | trim }}{{- ' ' }}{{- eos_token }}{%- endgeneration %}
{%- endif %}{%- endfor %}"""
)
_MISTRAL = (
    _limits("mistral", "system", "user", "assistant", system_first=True, turns=True)
    + _SYSTEM_OFF
    + """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}
    {{- '[INST] ' + (system + '\\n\\n' if loop.first and system is not none else '') + message.content + ' [/INST]' }}
{%- else %}
    {{- ' ' }}{%- generation %}{{- message.content }}{{- eos_token }}{%- endgeneration %}
{%- endif %}{%- endfor %}"""
)
_GEMMA = (
    _limits("gemma", "system", "user", "assistant", system_first=True, turns=True)
    + _SYSTEM_OFF
    + """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
    {{- '<start_of_turn>model\\n' }}
    {%- generation %}{{- message.content | trim }}{{- '<end_of_turn>' }}{%- endgeneration %}{{- '\\n' }}
{%- else %}
    {{- '<start_of_turn>user\\n' + (system + '\\n\\n' if loop.first and system is not none else '') }}
    {{- message.content | trim + '<end_of_turn>\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""
)
_VICUNA = (
    _limits("vicuna", "system", "user", "assistant", system_first=True, turns=True)
    + _SYSTEM_OFF
    + """\
{{- bos_token }}
{%- if system is none %}
    {{- 'A chat between a curious user and an artificial intelligence assistant. ' }}
    {{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " }}
{%- elif system %}
    {{- system + ' ' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}
    {{- 'USER: ' + message.content + ' ' }}
{%- else %}
    {{- 'ASSISTANT: ' }}{%- generation %}{{- message.content }}{{- eos_token }}{%- endgeneration %}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"""
)


def _tagged(name: str, end: str, assistant_end: str, *, last: str = "") -> str:
    """Formats in which `<|role|>` opens a message.

    Args:
        end, assistant_end: expressions for what closes a message, and an answer; a line end follows both.
        last: what stands at the end of a conversation that is complete.
    """
    behind = "{%- else %}{{- " + last + " }}" if last else ""
    return (
        _limits(name, "system", "user", "assistant")
        + "{%- for message in messages %}{{- '<|' + message.role + '|>\\n' }}\n"
        "{%- if message.role == 'assistant' %}\n"
        "{%- generation %}{{- message.content }}{{- " + assistant_end + " }}{%- endgeneration %}\n"
        "{%- else %}{{- message.content }}{{- " + end + " }}{%- endif %}{{- '\\n' }}{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}" + behind + "{%- endif %}"
    )


TEMPLATES: dict[str, str] = {
    "chatml": _chatml("chatml"),
    "qwen2.5": _chatml("qwen2.5", system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": _chatml("qwen3", reasoning=True),
    "llama-2": _LLAMA_2,
    "llama-3": _LLAMA_3,
    "llama-3.1": _LLAMA_3_1,
    "mistral": _MISTRAL,
    "gemma": _GEMMA,
    "phi-3": _tagged("phi-3", "'<|end|>'", "'<|end|>'", last="eos_token"),
    "tulu-2": _tagged("tulu-2", "''", "eos_token"),
    "zephyr": _tagged("zephyr", "eos_token", "eos_token"),
    "vicuna": _VICUNA,
}
