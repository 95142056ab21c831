"""Session files (safetensors): what a Session has read, and what it must agree with before it is taken up again."""

import hashlib
import json
from pathlib import Path

from minillm.cache import state as cache_state
from minillm.engine.admission import HELD
from minillm.errors import MemoryShort, MinillmError
from minillm.files import own_file
from minillm.files.formats import QUANTIZED

SESSION_FORMAT = 4


def identity(llm, compressor):
    """What a file of a session of an LLM with a Compressor must agree with: {name: value}. Raises MinillmError."""
    if llm.weights_digest is None:
        raise MinillmError("sessions are saved and taken up only of models that were loaded from files")
    asked = compressor.asked
    return {
        "version": SESSION_FORMAT,
        "weights": llm.weights_digest,
        "quantize": llm.dtype if llm.dtype in QUANTIZED else None,
        "cache dtype": llm.pool_of(compressor.config.dtype).format.name,
        **compressor.config.as_dict(),  # before what hangs on the method
        "profile": compressor.profile if compressor.config.profiled else None,
        "questions": hashlib.sha256(repr(asked).encode()).hexdigest()[:16] if asked else None,
    }


def write(session, path):
    """Write a Session whose turn has ended, all of it or nothing. Raises MinillmError."""
    state = {"unread": session.unread, "messages": session.messages, "rendered": session.rendered}
    texts = {"minillm_session": json.dumps(identity(session.llm, session.compressor)), "state": json.dumps(state)}
    with session.llm.engine.alone():
        arrays = cache_state.state(session.cache)
    own_file.write(Path(path).expanduser(), arrays, texts)


def opened(session, path):
    """(arrays, texts) of a file that may be taken up by a Session. Raises MinillmError for one that is damaged, or of
    other weights or another dtype, method or version."""
    arrays, texts = own_file.read(Path(path).expanduser(), "session", "delete it or name another file")
    saved = json.loads(texts["minillm_session"])
    for name, here in identity(session.llm, session.compressor).items():
        if saved.get(name) != here:
            raise MinillmError(
                f"{path} was saved with {name} {saved.get(name)!r} and this is {here!r}: name another file or delete it"
            )
    return arrays, texts


def read(session, path, arrays, texts):
    """-> a KVCache and (unread, messages, rendered), of an `opened` file. Raises MinillmError where it is damaged, and
    MemoryShort where it does not fit beside what is promised. The engine must be alone."""
    llm, compressor = session.llm, session.compressor
    cache = llm.new_cache(session.cache.window, compressor.config.dtype)
    try:
        state = _checked(llm, json.loads(texts["state"]))
        llm.encode(arrays["token_ids"].tolist())
        compressor.check_left(arrays, llm.config.n_heads)
        if not cache.pool.reserve(cache, int((-(-arrays["lengths"] // cache.pool.page_size)).sum())):
            raise MemoryShort(HELD)
        cache_state.restore(cache, arrays)
    except MemoryShort:
        raise
    except (KeyError, TypeError, ValueError, MinillmError) as error:
        raise MinillmError(f"{path} is damaged ({error}): delete it and read the prompt again") from None
    finally:
        cache.pool.unreserve(cache)
    return cache, state


def _checked(llm, state):
    """(unread, messages, rendered) of the state that `write` wrote, or KeyError, TypeError, ValueError, UsageError."""
    unread, messages, rendered = state["unread"], state["messages"], state["rendered"]
    if not isinstance(unread, list) or not isinstance(messages, list) or not isinstance(rendered, str | None):
        raise TypeError("its state is not an object")
    for message in messages:
        words = isinstance(message, dict) and all(isinstance(text, str) for text in message.values())
        if not words or set(message) != {"role", "content"}:
            raise ValueError("it holds a malformed message")
    return llm.encode(unread), messages, rendered
