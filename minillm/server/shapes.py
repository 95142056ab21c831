"""What answers look like: the objects of chat completions and of text completions, whole and in pieces."""

import secrets
import time

from minillm.server.likely import ChatLogprobs, TextLogprobs

REASONS = {"eos": "stop", "stop": "stop", "length": "length", None: "length"}  # None: it says nothing, as was asked


class Shape:
    """The objects of one answer. model: its name; fingerprint: of the model and the settings that answer."""

    prefix = kind = chunk_kind = logprobs = None

    def __init__(self, model, fingerprint):
        self.head = {"id": self.prefix + secrets.token_hex(12), "object": self.kind, "created": int(time.time())}
        self.head |= {"model": model, "system_fingerprint": fingerprint}

    def whole(self, choices, usage, timings):
        """The object of an answer that is complete. choices: (text, reason, logprobs) of each."""
        found = [self.choice(i, *one) for i, one in enumerate(choices)]
        return self.head | {"choices": found, "usage": usage, "timings": timings}

    def chunk(self, choices, **more):
        """The object of a piece."""
        return self.head | {"object": self.chunk_kind, "choices": choices} | more


class Chat(Shape):
    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    logprobs = ChatLogprobs

    def choice(self, index, text, reason, logprobs):
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def begin(self, index):
        """What comes before the first piece of a choice, or None."""
        return self._delta(index, {"role": "assistant", "content": ""})

    def piece(self, index, text, logprobs):
        return self._delta(index, {"content": text}, logprobs=logprobs)

    def end(self, index, reason):
        return self._delta(index, {}, reason)

    def _delta(self, index, delta, reason=None, logprobs=None):
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


class Text(Shape):
    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"
    logprobs = TextLogprobs

    def choice(self, index, text, reason, logprobs):
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def begin(self, index):
        return None

    def piece(self, index, text, logprobs):
        return self.choice(index, text, None, logprobs)

    def end(self, index, reason):
        return self.choice(index, "", reason, None)


def usage(prompts, answers):
    """prompts, answers: Timings, of each prompt and of each answer."""
    read = sum(one.prompt_tokens + one.cached_tokens for one in prompts)
    cached, made = sum(one.cached_tokens for one in prompts), sum(one.generated_tokens for one in answers)
    about = {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
    return about | {"prompt_tokens_details": {"cached_tokens": cached}}


def timings(one):
    """Timings as llama.cpp's server has them."""
    about = {"cache_n": one.cached_tokens}
    for name, n, seconds in (
        ("prompt", one.prompt_tokens, one.prompt_seconds),
        ("predicted", one.generated_tokens, one.generation_seconds),
    ):
        about |= {f"{name}_n": n, f"{name}_ms": 1000 * seconds}
        about[f"{name}_per_token_ms"] = 1000 * seconds / n if n else 0.0
        about[f"{name}_per_second"] = n / seconds if seconds else 0.0
    return about
