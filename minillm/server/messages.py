"""The messages of a chat, checked: a list of Messages, or one clear sentence."""

from dataclasses import dataclass

from minillm.server.errors import bad
from minillm.server.fields import shown

ROLES = ("system", "developer", "user", "assistant")
BILLING = "x-anthropic-billing-header:"  # a line that some clients put before everything, another one each time


@dataclass
class Part:
    """A piece of a message's text."""

    text: str
    breaks: bool = False  # whether the client says that a reusable prefix ends here


@dataclass
class Message:
    role: str  # "system", "user" or "assistant"
    parts: list[Part]

    @property
    def text(self):
        """Parts are joined by the end of a line."""
        return "\n".join(part.text for part in self.parts)


def checked(body, file_text=lambda file_id: None):
    """The Messages of a request's JSON object. file_text: the text of a file's id, or None. Raises ApiError."""
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise bad('messages must be a list of {"role", "content"} with at least one of them', "messages")
    found = [_message(one, f"messages[{i}]", file_text) for i, one in enumerate(given)]
    if [message.role for message in found[-2:]] == ["assistant"] * 2:
        raise bad("the last two messages are both the assistant's: join them into one that is to go on", "messages")
    if not any(part.text for message in found for part in message.parts):
        raise bad("the messages are all empty: ask something", "messages")
    return found


def _message(one, where, file_text):
    if not isinstance(one, dict):
        raise bad(f"{where} must be an object with role and content, not {shown(one)}", where)
    role = one.get("role")
    if role == "tool":
        raise bad(f"{where} is a tool's, and this server cannot do tools yet: leave it out", where)
    if role not in ROLES:
        raise bad(f"{where}.role must be one of {', '.join(ROLES)}, not {shown(role)}", f"{where}.role")
    if one.get("tool_calls") or one.get("function_call"):
        raise bad(f"{where} calls a tool, and this server cannot do tools yet: leave it out", where)
    role = "system" if role == "developer" else role
    return Message(role, _parts(one.get("content"), role, f"{where}.content", file_text))


def _parts(content, role, where, file_text):
    if content is None and role == "assistant":
        return [Part("")]
    if isinstance(content, str):
        return [Part(_without_billing(content) if role == "system" else content)]
    if not isinstance(content, list) or not content:
        raise bad(f"{where} must be a text or a list of parts, not {shown(content)}", where)
    parts = [_part(part, f"{where}[{i}]", file_text) for i, part in enumerate(content)]
    if role == "system":
        parts = [part for part in parts if not part.text.startswith(BILLING)]
    return parts or [Part("")]


def _part(part, where, file_text):
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "file":
        return Part(_file(part.get("file"), f"{where}.file", file_text), breaks=True)
    if kind != "text":
        raise bad(f"{where} must be a part of type text or file, not {shown(part)}", where)
    if not isinstance(part.get("text"), str):
        raise bad(f"{where}.text must be a text, not {shown(part.get('text'))}", f"{where}.text")
    return Part(part["text"], _breaks(part, where))


def _file(file, where, file_text):
    """Its text."""
    file_id = file.get("file_id") if isinstance(file, dict) else None
    if not isinstance(file_id, str):
        raise bad(f'{where} must be {{"file_id": ...}}, of a file of POST /v1/files, not {shown(file)}', where)
    if (text := file_text(file_id)) is None:
        raise bad(f"there is no file {shown(file_id)} here: upload it to /v1/files", where)
    return text


def _breaks(part, where):
    """Anthropic's and OpenAI's words for it."""
    for name, key, value in (("cache_control", "type", "ephemeral"), ("prompt_cache_breakpoint", "mode", "explicit")):
        mark = part.get(name)
        if mark is None:
            continue
        if not isinstance(mark, dict) or mark.get(key) != value:
            raise bad(f'{where}.{name} must be {{"{key}": "{value}"}}, not {shown(mark)}', f"{where}.{name}")
        return True
    return False


def _without_billing(text):
    return text.partition("\n")[2] if text.startswith(BILLING) else text
