"""Built-in chat templates, by name.

Each marks what the assistant says, its end-of-turn token included, with `{% generation %}`. They write the formats as
their model families document them; use the tokenizer's own template where it has one, unless you train a base model.
Control tokens are written out, except begin- and end-of-text, which are the tokenizer's.
"""


def _chatml(default_system: str = "", empty_think: bool = False) -> str:
    think = "<think>\\n\\n</think>\\n\\n" if empty_think else ""
    default = f"{{{{- '<|im_start|>system\\n{default_system}<|im_end|>\\n' }}}}" if default_system else ""
    shown = (
        "{%- if loop.last and not message.content.lstrip().startswith('<think>') %}{{- '" + think + "' }}{%- endif %}"
        if think
        else ""
    )
    return (
        "{%- if messages[0].role != 'system' %}" + default + "{%- endif %}"
        "{%- for message in messages %}"
        "{{- '<|im_start|>' + (message.role if message.role != 'tool' else 'user') + '\\n' }}"
        "{%- if message.role == 'assistant' %}" + shown + "{%- generation %}{{- message.content }}"
        "{%- for call in message.tool_calls or [] %}{%- set call = call.function or call %}"
        '{{- \'\\n<tool_call>\\n{"name": "\' + call.name + \'", "arguments": \' }}{{- call.arguments | tojson }}'
        "{{- '}\\n</tool_call>' }}{%- endfor %}"
        "{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}"
        "{%- elif message.role == 'tool' %}"
        "{{- '<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}"
        "{%- else %}{{- message.content + '<|im_end|>\\n' }}{%- endif %}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )


def _headers(system_default: bool) -> str:
    """Llama 3: role headers, text in between trimmed."""
    dated = (
        "{%- if strftime_now is defined %}{%- set today = strftime_now('%d %b %Y') %}"
        "{%- else %}{%- set today = '26 Jul 2024' %}{%- endif %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: '"
        " + today + '\\n\\n' }}"
        "{%- if messages[0].role == 'system' %}{{- messages[0].content | trim }}{%- set messages = messages[1:] %}"
        "{%- endif %}{{- '<|eot_id|>' }}"
        if system_default
        else ""
    )
    return (
        "{{- bos_token }}" + dated + "{%- for message in messages %}"
        "{%- set role = message.role if message.role != 'tool' else 'ipython' %}"
        "{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}"
        "{%- if message.role == 'assistant' %}{%- generation %}{{- message.content | trim }}"
        "{%- for call in message.tool_calls or [] %}{%- set call = call.function or call %}"
        "{{- '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{- call.arguments | tojson }}{{- '}' }}"
        "{%- endfor %}{{- '<|eot_id|>' }}{%- endgeneration %}"
        "{%- else %}{{- message.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
    )


def _instructions(space: str, system: str, bos_each_turn: bool) -> str:
    """Llama 2 and Mistral: questions between [INST] and [/INST], the system text inside the first one."""
    before = "{{- bos_token }}" if bos_each_turn else "{%- if loop.first %}{{- bos_token }}{%- endif %}"
    return (
        "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}"
        "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
        "{%- for message in messages %}"
        "{%- if message.role == 'user' %}" + before + "{{- '[INST] ' }}"
        "{%- if loop.first and system %}{{- " + system + " }}{%- endif %}"
        "{{- message.content | trim + ' [/INST]' }}"
        "{%- elif message.role == 'assistant' %}{{- ' ' }}{%- generation %}{{- message.content | trim }}"
        "{{- '" + space + "' + eos_token }}{%- endgeneration %}"
        "{%- else %}{{- raise_exception('this template knows the roles system, user and assistant only') }}{%- endif %}"
        "{%- endfor %}"
    )


def _tagged(tags: dict[str, str], end: str, assistant_end: str, *, begin: str = "", trim: bool = False) -> str:
    """Formats in which a tag opens each message and a token or line end closes it."""
    content = "message.content | trim" if trim else "message.content"
    parts = [f"{{%- if {begin!r} %}}{{{{- bos_token }}}}{{%- endif %}}{{%- for message in messages %}}"]
    word = "if"
    for role, tag in tags.items():
        parts.append(f"{{%- {word} message.role == '{role}' %}}{{{{- {tag!r} }}}}")
        word = "elif"
        if role == "assistant":
            parts.append(
                f"{{%- generation %}}{{{{- {content} }}}}{{{{- {assistant_end} }}}}{{%- endgeneration %}}"
                + ("{{- '\\n' }}" if end.endswith("\n") or assistant_end == "eos_token" else "")
            )
        else:
            parts.append(f"{{{{- {content} }}}}{{{{- {end!r} }}}}")
    parts.append(
        "{%- else %}{{- raise_exception('this template has no role ' + message.role) }}{%- endif %}{%- endfor %}"
        f"{{%- if add_generation_prompt %}}{{{{- {tags['assistant']!r} }}}}{{%- endif %}}"
    )
    return "".join(parts)


_GEMMA = (
    "{{- bos_token }}"
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim + '\\n\\n' %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}{{- '<start_of_turn>model\\n' }}"
    "{%- generation %}{{- message.content | trim }}{{- '<end_of_turn>' }}{%- endgeneration %}{{- '\\n' }}"
    "{%- else %}{{- '<start_of_turn>user\\n' + (system if loop.first else '') + message.content | trim"
    " + '<end_of_turn>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"
)
_PHI3_TAGS = {"system": "<|system|>\n", "user": "<|user|>\n", "assistant": "<|assistant|>\n"}

TEMPLATES: dict[str, str] = {
    "chatml": _chatml(),
    "qwen2.5": _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": _chatml(empty_think=True),
    "llama-2": _instructions(" ", "'<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n'", True),
    "llama-3": _headers(False),
    "llama-3.1": _headers(True),
    "mistral": _instructions("", "system + '\\n\\n'", False),
    "gemma": _GEMMA,
    "phi-3": _tagged(_PHI3_TAGS, "<|end|>\n", "'<|end|>'"),
    "tulu-2": _tagged(_PHI3_TAGS, "\n", "eos_token"),
    "zephyr": _tagged(_PHI3_TAGS, "</s>\n", "eos_token"),
    "vicuna": _tagged({"system": "", "user": "USER: ", "assistant": "ASSISTANT: "}, " ", "eos_token", begin="bos"),
}
