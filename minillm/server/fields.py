"""The fields of a request: each checked, with an error that names it. null is as good as absent."""

from dataclasses import dataclass

from minillm.compress.config import OUTCOMES, CacheConfig
from minillm.constraint import Constraint
from minillm.errors import UsageError
from minillm.sampling import SamplingParams
from minillm.server.errors import bad

MOST_CHOICES = 8
MOST_STOPS = 16
MOST_LIKELY = {True: 20, False: 5}  # tokens at each place that a chat is told, and a completion
LARGEST = 1e20  # of all numbers in a request

# Fields that clients know and this server cannot do yet, with the values that ask for nothing. They are refused, and
# never ignored: an answer that looks right and is not what was asked for is worse than none.
NOT_YET = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "n_probs": (0,),
    "suffix": ("",),
    "best_of": (1,),
    "modalities": (["text"],),
    "audio": (),
    "return_progress": (False,),
    "timings_per_token": (False,),
    "return_cache": (False,),
}


@dataclass(frozen=True)
class Wanted:
    """How a request is to be answered."""

    params: tuple[SamplingParams | None, ...]  # of each choice; None: nothing is generated
    stream: bool
    include_usage: bool
    cache: CacheConfig | None  # None: the server's
    cache_prompt: bool = True  # whether prefixes are taken from snapshots, and kept as such
    salt: str = ""  # prefixes are shared by those who have the same
    explicit: bool = False  # whether only the client says where prefixes end
    echo: bool = False  # whether the prompt is a part of the answer
    scores: int | None = None  # how many of the likeliest each token of that prompt is told with; None: it is not


def wanted(body, defaults, cache, chat):
    """The Wanted of a request's JSON object. defaults: SamplingParams, cache: CacheConfig of the server; chat: whether
    it is of a chat, and not a completion. Raises ApiError."""
    refuse_what_is_not_yet(body)
    options = of_type(body, "stream_options", dict, "an object") or {}
    n, echo = whole(body, "n", 1), truth(body, "echo")
    if not 1 <= n <= MOST_CHOICES:
        raise bad(f"n must be in 1..{MOST_CHOICES}, not {n}", "n")
    if echo and chat:
        raise bad("echo is of completions: leave it out of a chat", "echo")
    most = length(body, defaults.max_tokens, least=0 if echo else 1)
    if most == 0 and n > 1:
        raise bad("n must be 1 where max_tokens is 0: there is one answer that says nothing", "n")
    try:
        params = choices(sampling(body, defaults, most or None, chat), n)
    except UsageError as error:
        raise bad(str(error)) from None
    config, scores = cache_config(body, cache), params[0].logprobs if echo else None
    if scores is not None and config is None:  # the likelihood is the model's, not its cache's
        config = CacheConfig("full", dtype=cache.dtype)
    include_usage, params = truth(options, "include_usage"), (None,) if most == 0 else params
    return Wanted(params, truth(body, "stream"), include_usage, config, *prefixes(body), echo, scores)


def refuse_what_is_not_yet(body):
    for name, harmless in NOT_YET.items():
        value = body.get(name)
        if value is not None and not any(value == one and type(value) is type(one) for one in harmless):
            raise bad(f"this server cannot do {name} yet: leave it out", name)


def sampling(body, defaults, max_tokens, chat):
    """The SamplingParams of the first choice. Raises ApiError and UsageError."""
    penalty = number(body, "repeat_penalty", number(body, "repetition_penalty", defaults.repeat_penalty))
    seed, top_k = whole(body, "seed", defaults.seed), whole(body, "top_k", defaults.top_k)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=number(body, "temperature", defaults.temperature),
        top_k=0 if top_k == -1 else top_k,
        top_p=number(body, "top_p", defaults.top_p),
        min_p=number(body, "min_p", defaults.min_p),
        repeat_penalty=penalty,
        seed=None if seed in (None, -1) else seed % (1 << 64),
        stop=stops(body),
        ignore_eos=truth(body, "ignore_eos"),
        presence_penalty=number(body, "presence_penalty", defaults.presence_penalty),
        frequency_penalty=number(body, "frequency_penalty", defaults.frequency_penalty),
        logit_bias=biases(body),
        logprobs=likeliest(body, chat),
        constraint=constraint(body),
    )


def choices(params, n):
    """SamplingParams of n choices: the same, but for the seed of each."""
    values = {name: getattr(params, name) for name in SamplingParams.names()}
    seeds = [None if params.seed is None else params.seed + i for i in range(n)]
    return tuple(SamplingParams(**values | {"seed": seed}) for seed in seeds)


def length(body, default, least=1):
    """The least of the names that clients have for it; -1: no limit."""
    given = [whole(body, name) for name in ("max_tokens", "max_completion_tokens", "n_predict")]
    given = [one for one in given if one is not None]
    limits = [one for one in given if one != -1]
    if any(one < least for one in limits):
        raise bad(f"max_tokens must be at least {least}, not {min(limits)}", "max_tokens")
    return min(limits) if limits else None if given else default


def biases(body):
    """(token id, bias) of OpenAI's object and of llama.cpp's list of pairs, where false is never."""
    given = body.get("logit_bias")
    pairs = list(given.items()) if isinstance(given, dict) else [] if given is None else given
    found = []
    for pair in pairs if isinstance(pairs, list) else [None]:
        token, bias = pair if isinstance(pair, list | tuple) and len(pair) == 2 else (None, None)
        token = int(token) if isinstance(token, str) and token.isdecimal() and len(token) < 20 else token
        bias = float("-inf") if bias is False else bias
        if not is_id(token) or not isinstance(bias, int | float) or isinstance(bias, bool):
            raise bad('logit_bias must be an object {"token id": bias}, or a list of [token id, bias]', "logit_bias")
        found.append((token, bias))
    return found


def likeliest(body, chat):
    """How many of the likeliest tokens are told beside each token of the answer; None: nothing is."""
    most = MOST_LIKELY[chat]
    name, found = "logprobs", body.get("logprobs")
    if chat:
        name, given, found = "top_logprobs", truth(body, "logprobs"), whole(body, "top_logprobs")
        if found and not given:
            raise bad('top_logprobs needs "logprobs": true', "top_logprobs")
        found = (found or 0) if given else None
    elif found is not None:
        found = None if found is False else whole(body, "logprobs")
    if found is not None and not 0 <= found <= most:
        raise bad(f"{name} must be in 0..{most}, not {found}", name)
    return found


def constraint(body):
    """The Constraint of an answer, or None. Raises ApiError and UsageError."""
    found = []
    form = of_type(body, "response_format", dict, "an object") or {}
    kind, schema = form.get("type", "text"), form.get("schema")  # llama.cpp's place for it
    if kind == "json_schema":
        schema = (of_type(form, "json_schema", dict, "an object") or {}).get("schema", schema)
        if schema is None:
            raise bad("response_format.json_schema has no schema: give one", "response_format")
    if kind in ("json_object", "json_schema"):
        found.append(Constraint.json_object() if schema is None else of_schema(schema, "response_format"))
    elif kind != "text":
        raise bad(
            f"response_format.type must be text, json_object or json_schema, not {shown(kind)}", "response_format"
        )
    if (schema := body.get("json_schema")) is not None:
        found.append(of_schema(schema, "json_schema"))
    if grammar := of_type(body, "grammar", str, "a text"):
        found.append(Constraint.gbnf(grammar))
    if len(found) > 1:
        raise bad("response_format, json_schema and grammar each say what the answer must be: give one of them")
    return found[0] if found else None


def of_schema(schema, name):
    if not isinstance(schema, dict | bool):
        raise bad(f"{name}: a JSON schema must be an object, not {shown(schema)}", name)
    return Constraint.json_schema(schema)


def stops(body):
    stop = body.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(one, str) and one for one in stop) or len(stop) > MOST_STOPS:
        raise bad(f"stop must be a text or a list of up to {MOST_STOPS} texts that are not empty", "stop")
    return tuple(stop)


def cache_config(body, now):
    """The CacheConfig of the field `kv`, which changes the server's; None where it says nothing."""
    kv = of_type(body, "kv", dict, "an object") or {}
    if unknown := sorted(kv.keys() - {"budget", "method", "dtype"}):
        raise bad(f"kv has no {unknown[0]!r}, but budget and method", "kv")
    budget, method = kv.get("budget"), of_type(kv, "method", str, "the name of a method")
    if kv.get("dtype") not in (None, now.dtype):
        raise bad(f"kv.dtype is {now.dtype!r} for all requests of this server: they share one memory", "kv.dtype")
    if budget is None and method is None:
        return None
    if budget == 1 and isinstance(budget, int):
        raise bad('kv.budget 1 could be a share or an entry: write "full", or at least 2 entries a head', "kv.budget")
    if method in (None, now.method) and now.method != "full":
        settings = {name: value for name, value in now.as_dict().items() if budget is None or name not in OUTCOMES}
    else:
        settings = {"method": method, "dtype": now.dtype}
    try:
        return CacheConfig(**settings | ({} if budget is None else {"budget": budget}))
    except (UsageError, TypeError) as error:
        raise bad(f"kv: {error}", "kv") from None


def prefixes(body):
    """(cache_prompt, salt, explicit)"""
    salts = [of_type(body, name, str, "a text", "") for name in ("cache_salt", "prompt_cache_key")]
    options = of_type(body, "prompt_cache_options", dict, "an object") or {}
    if (mode := options.get("mode")) not in (None, "implicit", "explicit"):
        raise bad(f"prompt_cache_options.mode must be implicit or explicit, not {shown(mode)}", "prompt_cache_options")
    return truth(body, "cache_prompt", True), "\0".join(filter(None, salts)), mode == "explicit"


def of_type(body, name, kind, what, default=None):
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise bad(f"{name} must be {what}, not {shown(value)}", name)
    return value


def truth(body, name, default=False):
    return of_type(body, name, bool, "true or false", default)


def number(body, name, default=None):
    value = of_type(body, name, int | float, "a number", default)
    if value is not None and not abs(value) < LARGEST:  # nor NaN
        raise bad(f"{name} must be a number of less than {LARGEST:.0e}", name)
    return value


def whole(body, name, default=None):
    value = number(body, name, default)
    if value is not None and value != int(value):
        raise bad(f"{name} must be a whole number, not {shown(value)}", name)
    return None if value is None else int(value)


def is_id(value):
    """Whether it may be a token's id: a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value):
    """A value in an error: its beginning."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
