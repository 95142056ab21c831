"""Chat templates: Jinja text that turns a list of messages into the prompt a model was trained on.

Templates come with models, so they run in Jinja's sandbox, with the settings and helpers that transformers gives them.
"""

import json
from datetime import datetime
from pathlib import Path

from minillm.errors import MinillmError, UsageError

_LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}
{% set system = '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' %}
{% set messages = messages[1:] %}
{% else %}
{% set system = '' %}
{% endif %}
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' -}}
{% else %}
{{ ' ' + message['content'].strip() + ' ' + eos_token -}}
{% endif %}
{% endfor %}"""
_MISTRAL = """\
{{ bos_token -}}
{% if messages[0]['role'] == 'system' %}
{% set system = messages[0]['content'].strip() + '\\n\\n' %}
{% set messages = messages[1:] %}
{% else %}
{% set system = '' %}
{% endif %}
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' -}}
{% else %}
{{ ' ' + message['content'].strip() + eos_token -}}
{% endif %}
{% endfor %}"""
_LLAMA3 = """\
{{ bos_token -}}
{% for message in messages %}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'].strip() + '<|eot_id|>' -}}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{% endif %}"""
_CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' -}}
{% endif %}"""
_ZEPHYR = """\
{% for message in messages %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>\\n' -}}
{% endif %}"""
NAMED = {"chatml": _CHATML, "llama2": _LLAMA2, "llama3": _LLAMA3, "mistral": _MISTRAL, "zephyr": _ZEPHYR}


def find_template(name_or_text: str) -> str:
    """The text of a template: one of NAMED, a file, or already the text. Raises UsageError."""
    if name_or_text in NAMED:
        return NAMED[name_or_text]
    if "{{" in name_or_text or "{%" in name_or_text:
        return name_or_text
    try:
        return Path(name_or_text).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        names = ", ".join(NAMED)
        raise UsageError(
            f"chat template {name_or_text!r} is neither one of {names} nor a readable text file"
        ) from error


class ChatTemplate:
    def __init__(self, text: str):
        """Raises MinillmError if the text is no Jinja template."""
        import jinja2  # 0.1 s: only chats need it
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """{% generation %} marks the assistant's words for training; here it is only its content."""

            tags = {"generation"}

            def parse(self, parser):
                line = next(parser.stream).lineno
                return jinja2.nodes.Scope(
                    parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line
                )

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise _failed(error) from error

    def render(self, messages: list[dict], **variables) -> str:
        """`variables`: add_generation_prompt, bos_token, eos_token. Raises MinillmError."""
        try:
            return self._template.render(messages=messages, tools=None, documents=None, **variables)
        except Exception as error:  # a template can fail in any way that Python code can
            raise _failed(error) from error


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _failed(error: Exception) -> MinillmError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return MinillmError(f"the chat template failed ({reason}): try --chat-template {'/'.join(NAMED)}, or --raw")
