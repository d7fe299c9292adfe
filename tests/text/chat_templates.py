"""Chat templates in the manner of those that models come with: short, but each with its quirk."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.support.tokenizers import byte_level, metaspace

# Trims every content, writes a date and a system message of its own.
LLAMA = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set system = "
    "messages[0]['content']|trim %}{%- set messages = messages[1:] %}{%- else %}"
    "{%- set system = '' %}{%- endif %}{%- if tools is not none %}{%- for t in tools %}"
    "{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}{%- endif %}"
    "{{- '<|start|>system<|end|>\\n\\nToday: ' + strftime_now('%Y') + '\\n' + system + '<|eot|>' }}"
    "{%- for m in messages %}{{- '<|start|>' + m['role'] + '<|end|>\\n\\n' }}"
    "{%- if 'tool_calls' in m %}{{- m.tool_calls | tojson }}{%- else %}"
    "{{- m['content'] | trim }}{%- endif %}{{- '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}"
)
# The system message goes into the last user's turn; roles must alternate.
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif %}"
    "{{ bos_token }}{% for m in loop_messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{% if loop.last and system is defined %}"
    "{{ '[INST] ' + system + '\\n\\n' + m['content'] + '[/INST]' }}{% else %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}{% else %}"
    "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Thinking is cut out of turns before the last question, tools' answers come as a user's.
QWEN = (
    "{%- if tools %}<|im_start|>system\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}"
    "\n</tools><|im_end|>\n{% endif %}{%- set ns = namespace(last=messages|length - 1) %}"
    "{%- for m in messages[::-1] %}{%- set i = messages|length - 1 - loop.index0 %}"
    "{%- if m.role == 'user' and m.content is string and not "
    "(m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) "
    "and ns.last == messages|length - 1 %}{%- set ns.last = i %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- set content = m.content if m.content is string else '' %}"
    "{%- if m.role == 'assistant' %}{%- set thought = '' %}{%- if m.reasoning_content is string %}"
    "{%- set thought = m.reasoning_content %}{%- elif '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1]"
    ".lstrip('\\n') %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\\n' }}{%- if loop.index0 > ns.last and thought %}"
    "{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- content.lstrip('\\n') + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
# The assistant is called model, system text stands before the first turn, contents may be parts.
GEMMA = (
    "{{ bos_token }}{%- set first = '' -%}{%- if messages[0]['role'] == 'system' -%}"
    "{%- if messages[0]['content'] is string -%}{%- set first = messages[0]['content'] + '\\n\\n'"
    " -%}{%- else -%}{%- set first = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}"
    "{%- set messages = messages[1:] -%}{%- endif -%}{%- for m in messages -%}"
    "{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}"
    "{{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}"
    "{%- if m['content'] is string -%}{{ m['content'] | trim }}{%- else -%}"
    "{%- for part in m['content'] -%}{{ part['text'] | trim }}{%- endfor -%}{%- endif -%}"
    "{{ '<end_of_turn>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
)
# The special tokens of roles are put together from the roles.
PHI = (
    "{% for m in messages %}{% if m['content'] %}{{ '<|' + m['role'] + '|>' + m['content'] + "
    "'<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
# A system message nobody wrote; messages as they are.
SMOL = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The roles' marks are ordinary text; only EOS is special.
ZEPHYR = (
    "{% for m in messages %}\n{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
# All system messages first, no line between turns, marks that are not ASCII.
DEEPSEEK = (
    "{% set ns = namespace(system='') %}{%- for m in messages %}{%- if m['role'] == 'system' %}"
    "{% set ns.system = ns.system + m['content'] %}{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.system }}{%- for m in messages %}{%- if m['role'] == 'user' %}"
    "{{ '<\uff5cUser\uff5c>' + m['content'] }}{%- elif m['role'] == 'assistant' %}"
    "{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<\uff5cAssistant\uff5c>' + content + eos_token }}{%- endif %}{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\\n' }}{% endif %}"
)


class Kind(NamedTuple):
    tokenizer: Any
    alternates: bool = False  # user and assistant must take turns


def _kind(tokenizer: Any, template: str, **options: Any) -> Kind:
    tokenizer.chat_template = template
    return Kind(tokenizer, **options)


_IM = ("<|im_start|>", "<|im_end|>")
KINDS = {
    "llama": _kind(
        byte_level("<|start|>", "<|end|>", "<|eot|>", bos_token="<|begin|>", eos_token="<|eot|>"),
        LLAMA,
    ),
    "mistral": _kind(metaspace("[INST]", "[/INST]"), MISTRAL, alternates=True),
    "qwen": _kind(
        byte_level(*_IM, added=("<think>", "</think>", "<tools>"), eos_token=_IM[1]), QWEN
    ),
    "gemma": _kind(metaspace("<start_of_turn>", "<end_of_turn>", scheme="never"), GEMMA),
    "phi": _kind(
        byte_level("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", eos_token="<|end|>"), PHI
    ),
    "smol": _kind(byte_level(*_IM, eos_token=_IM[1]), SMOL),
    "zephyr": _kind(metaspace(scheme="legacy"), ZEPHYR),
    "deepseek": _kind(
        byte_level(
            "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", bos_token="<bos>", eos_token="<eos>",
            added=("<think>", "</think>"),
        ),
        DEEPSEEK,
    ),
}  # fmt: skip
