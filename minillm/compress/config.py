"""CacheConfig: a method, how much it keeps, and its options; refuses what makes no sense. Recipe: carries them out."""

import functools

from minillm.compress.allocate import ALLOCATIONS, EVEN, PER_HEAD
from minillm.compress.merge import MERGES
from minillm.compress.methods import METHODS, find_method, options_of, parts
from minillm.compress.options import Option, delimiters, newest, number
from minillm.compress.plan import Budget
from minillm.compress.score import SCORES
from minillm.errors import UsageError
from minillm.ops.pages import DTYPES

DEFAULTS = {"budget": 0.5, "window": 32, "sinks": 4, "recompress": 256}  # of methods that have none of their own
QUALITY = 0.99  # that budget "auto" means
WITH_PROFILE, WITHOUT = "foresight", "hindsight"  # the methods taken for a model where none is named
COMMON = {
    "window": newest,
    "sinks": number(0, 1 << 30, int),
    "recompress": number(0, 1 << 30, int),
}
DELIMITERS = Option("default", delimiters, "default, exact, or a text of the characters that end a chunk")
OUTCOMES = ("tau", "threshold", "quality")  # in place of a budget: the kept share is what comes out
INSTEAD = (*OUTCOMES, "memory")
TABLES = {"score": SCORES, "allocate": ALLOCATIONS, "merge": MERGES}


class CacheConfig:
    """A method, how much it keeps, and its options.

    method: None: foresight where the model has a profile, else hindsight. budget: a share of the tokens seen (float in
    (0, 1]), a number of entries a head (int), "auto", or "full"; default: the method's, 0.5 or 0.3. quality: the share
    of what the model recalls that is to be left, by its profile's measurements, in place of a budget; "auto" is 0.99.
    memory: a share of the bytes of a full cache in 16-bit floats, in place of a budget: what entries of the dtype fit
    in; dtype "auto" then is the one that loses least.
    window, sinks: the newest and the first tokens, which stay (nothing joins them; what `match` fits it fits of them,
    too) and count in the budget (window < 1: a share of it); their defaults are the method's. recompress: during
    generation, what was generated is compressed every so many tokens (0: never) by methods that do that. dtype: of the
    keys and values in memory, one of DTYPES of ops/pages.py; "auto" is the backend's own floats. score, allocate,
    merge: a part in place of the method's own, by its name in SCORES, ALLOCATIONS, MERGES. Other options are those of
    the parts; unknown or contradictory ones raise UsageError.

    Frozen: `replace` makes another. Two that say the same are equal."""

    _frozen = False

    def __init__(
        self,
        method=None,
        budget=None,
        *,
        quality=None,
        memory=None,
        window=None,
        sinks=None,
        recompress=None,
        dtype="auto",
        **options,
    ):
        if dtype not in DTYPES:
            *names, last = DTYPES
            raise UsageError(f"a cache's dtype is {', '.join(names)} or {last}, not {dtype!r}")
        self.dtype = dtype
        self.method = method if budget != "full" else "full"
        self.spec = find_method(method or WITH_PROFILE)  # whose options WITHOUT has, too
        self.chosen = {part: options.pop(part) for part in TABLES if part in options}
        self._take_parts()
        self._take_options(method, options, {"window": window, "sinks": sinks, "recompress": recompress})
        if self.method != "full" and (reason := self._contradiction()):
            named = {part: getattr(self.spec, part) for part in TABLES} | self.chosen
            shown = ", ".join(f"{part} {name}" for part, name in named.items() if isinstance(name, str))
            raise UsageError(f"cache method {method or WITH_PROFILE!r} with {shown} makes no sense: {reason}")
        self._take_outcome(method, budget, quality, memory)
        self._frozen = True

    def __setattr__(self, name, value):
        if self._frozen:
            raise AttributeError(f"a CacheConfig does not change: make another with replace({name}=...)")
        super().__setattr__(name, value)

    def __eq__(self, other):
        return isinstance(other, CacheConfig) and repr(self) == repr(other)

    def __hash__(self):
        return hash(repr(self))

    def replace(self, **changes):
        """The same settings but for some. Raises UsageError where they do not go together."""
        return CacheConfig(**self.as_dict() | changes)

    def _take_parts(self):
        """The score, the allocation and the merge: those chosen, or the method's own."""
        for part, name in self.chosen.items():
            if name not in TABLES[part]:
                raise UsageError(f"{part}: {name!r} is not one of {', '.join(TABLES[part])}")
        if self.spec is METHODS["full"] and self.chosen:
            raise UsageError(f"cache method 'full' keeps everything: leave {', '.join(self.chosen)} out")
        self.score, self.allocation, self.merge = parts(self.spec, **self.chosen)

    def _take_options(self, method, options, common):
        """Those of the parts, and those that all methods have in `common` (None: not given)."""
        for name, value in common.items():
            value = self._default(name) if value is None else value
            setattr(self, name, self._checked(name, value, COMMON[name]))
        table = self.option_table(method, **self.chosen)
        for name in options:
            if name not in table:
                raise UsageError(self.lacks(method, name, **self.chosen))
        self.options = {name: self.spec.defaults.get(name, option.default) for name, option in table.items()}
        for name, value in options.items():
            if value != self.options[name]:
                self.options[name] = self._checked(name, value, table[name].check)
        for name, option in table.items():
            if option.needed and self.options[name] is None:
                raise UsageError(f"cache method {method!r} needs {name}: {option.meaning}")

    def _take_outcome(self, method, budget, quality, memory):
        """What says how much is kept: a budget, a quality, a share of memory, or an option that does."""
        if budget == "auto":
            if quality is not None:
                raise UsageError(f"budget auto is quality {QUALITY}: leave one of them out")
            budget, quality = None, QUALITY
        self.quality = None if quality is None else self._checked("quality", quality, number(0.01, 1))
        self.memory = None if memory is None else self._checked("memory", memory, number(1e-4, 1))
        given = self.options | {"budget": budget, "quality": quality, "memory": memory}
        named = [name for name in ("budget", *INSTEAD) if given.get(name) is not None]
        if len(named) > 1:
            raise UsageError(f"a cache {named[0]} and {named[1]} exclude each other: both say what is kept")
        fixed = named and named != ["budget"]
        if method == "full" and (fixed or budget not in (None, "full", 1, 1.0)):
            raise UsageError(f"cache method 'full' keeps everything: leave the {named[0]} out, or name another method")
        if quality is not None and not (self.predicts and "threshold" in self.options):
            raise UsageError(f"a quality is kept by method {WITH_PROFILE} alone, whose profile knows what that takes")
        self.budget = None
        if not fixed and self.method != "full":
            self.budget = self._budget(self._default("budget") if budget is None else budget)

    def _default(self, name):
        return (DEFAULTS | self.spec.defaults)[name]

    def resolve(self, profile=None, model="this model"):
        """The Recipe for one model, by name, and its Profile (None: it has none): with a method, and with the threshold
        that the quality takes. Raises MinillmError."""
        needs = f"needs a profile, and {model} has none: make one with python -m minillm.profile, or name"
        if self.quality is not None and profile is None:
            raise UsageError(f"a quality (budget auto is one) {needs} a budget, such as 0.3")
        if self.method is None:
            return self.replace(method=WITH_PROFILE if profile else WITHOUT).resolve(profile, model)
        if self.predicts and profile is None:
            raise UsageError(f"cache method {self.method!r} {needs} another method, such as {WITHOUT}")
        found = {} if self.quality is None else {"threshold": profile.threshold(self.quality)}
        return Recipe(self, self.options | found)

    @staticmethod
    def option_table(method, **chosen):
        """name -> Option of a method, some of its parts `chosen` by name."""
        method = method or WITH_PROFILE
        if method == "full":
            return {}
        spec = find_method(method)
        table = options_of(spec, *parts(spec, **chosen))
        return table | {"delimiters": DELIMITERS} if "chunking" in table else table

    @staticmethod
    def lacks(method, name, **chosen):
        """What is said of an option that `option_table` does not have."""
        table = CacheConfig.option_table(method, **chosen)
        valid = ", ".join([*table, *TABLES]) if method != "full" else "none"
        if method is not None:
            return f"cache method {method!r} has no option {name!r}; its options: {valid}"
        taken = f"without a method {WITH_PROFILE} or {WITHOUT} is taken, and"
        if name in CacheConfig.option_table(WITHOUT, **chosen):
            return f"{taken} only {WITHOUT} has an option {name!r}: name that method"
        return f"{taken} neither has an option {name!r}; the options of both: {valid}"

    @property
    def reads(self):
        """What the parts look at beside keys and values: queries of the "new" tokens, or of a second reading of them
        ("again"), scores "predicted" by a profile, "hidden" states of the new tokens, or nothing (None)."""
        if self.method == "full":
            return None
        return (self.score and self.score.reads) or self.allocation.reads or self.merge.reads

    @property
    def generates(self):
        """Whether what is generated is compressed as well: not where a method looks at what only a prompt has."""
        return self.spec.generates and self.reads not in ("again", "hidden")

    @property
    def predicts(self):
        """Whether what is kept of a token is decided by what a profile predicts when it is read."""
        return self.reads == "predicted"

    @property
    def profiled(self):
        """Whether scores hang on a profile: on what it predicts, or on what it says that entries are worth."""
        return self.predicts or (self.reads == "again" and self.options.get("worth", False))

    @property
    def remembers(self):
        """Whether entries keep their scores for the next compression."""
        return self.adds_up or self.predicts

    @property
    def adds_up(self):
        """Whether what a compression's entries score is kept for the next one."""
        return bool(self.score and self.score.adds_up)

    def _contradiction(self):
        """Why the three parts mean nothing together, or None."""
        score, allocation, merge = self.score, self.allocation, self.merge
        if allocation.scored and score is None:
            return "the allocation ranks rows by a score, and there is none: name one, such as score='window'"
        if score and not allocation.scored:
            return "the allocation looks at no score: leave the score out, or take allocate='even'"
        if merge.joined is True and not allocation.joins:
            return "the merge is of rows that join another, and this allocation makes none join: take merge='average'"
        if merge.joined is False and allocation.joins:
            return "the allocation says already which row each joins: take merge='cores' or 'drop'"
        if merge.compares and score.ranks_only:
            return "the merge weighs rows by how much better they score, and this score says only which is better"
        if len({part.reads for part in (score, allocation, merge) if part and part.reads}) > 1:
            return "its parts look at different things (new queries, a second reading, a profile): take score='window'"
        if merge.reads and allocation.layers is not EVEN:
            return "a later layer may compress this one again, when the merge's queries are gone: take allocate='even'"
        if self.options.get("positions") == "cache" and (allocation.heads, allocation.layers) != (PER_HEAD, EVEN):
            return "positions in the cache need heads of one length: take allocate='even'"
        return None

    @staticmethod
    def _checked(name, value, check):
        try:
            return check(value)
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from None

    @staticmethod
    def _budget(value):
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return Budget(entries=value)
        if isinstance(value, float) and 0 < value <= 1:
            return Budget(share=value)
        raise UsageError(
            f"budget {value!r} is neither a share in (0, 1], nor a whole number of entries a head, nor auto"
        )

    def protect(self, seen, budget):
        """(sinks, window) tokens that stay after `seen` tokens of which a Budget is kept."""
        if budget is None:
            return self.sinks, self.window
        window = self.window if isinstance(self.window, int) else round(self.window * budget.per_head(seen))
        return budget.protect(seen, self.sinks, window)

    def as_dict(self):
        """Plain values that say all of it: for session files and reports."""
        budget = None if self.budget is None else self.budget.entries or self.budget.share
        common = {"method": self.method, "budget": budget, "window": self.window, "sinks": self.sinks}
        for name in ("quality", "memory"):
            if getattr(self, name) is not None:
                common[name] = getattr(self, name)
        if self.dtype != "auto":
            common["dtype"] = self.dtype
        if self.method == "full":
            return common | {"recompress": self.recompress}
        options = {name: value for name, value in self.options.items() if name != "threshold" or not self.quality}
        return common | {"recompress": self.recompress} | self.chosen | options

    def __repr__(self):
        shown = ", ".join(f"{name}={value!r}" for name, value in self.as_dict().items() if name != "method")
        return f"CacheConfig({self.method!r}, {shown})"


class Recipe:
    """A CacheConfig bound to a model and its profile: carries the parts of the method out, one layer at a time.

    config: CacheConfig, its method named. options: those of the parts by name, the threshold of a quality included."""

    def __init__(self, config, options):
        self.config, self.options = config, options

    def scores(self, layer):
        """(R,) float32, or None where nothing is scored."""
        return self.config.score and self._run(self.config.score, layer)

    def targets(self, ledger, layer, scores):
        """The entries of the layers seen so far, this one the last."""
        return self._run(self.config.allocation.layers, ledger, layer, scores)

    def plan(self, layer, scores, target):
        """The Plan of a layer. target: entries to make; None: the method decides."""
        return self.merged(layer, scores, self.into(layer, scores, target))

    def into(self, rows, scores, target):
        """Which row each becomes part of: an Into. rows: a Layer, or Rows of several layers for one cut."""
        return self._run(self.config.allocation.heads, rows, scores, target)

    def merged(self, layer, scores, into):
        """The Plan of rows of which that is known."""
        plan = self._run(self.config.merge, layer, scores, into.rows)
        if plan.threshold is None:
            plan.threshold = into.threshold
        return plan

    def _run(self, part, *arguments):
        """What a Part makes of the arguments, with those of the options that are its own."""
        return part.run(*arguments, **{name: self.options[name] for name in part.options})


def unusual(cache):
    """The options of a configuration, but its budget, that are not its method's defaults, or have none."""
    if cache["method"] == "full":
        return {name: value for name, value in cache.items() if name == "dtype"}
    needed = {name: cache[name] for name in _needed(cache["method"])}
    usual = _usual(cache["method"], **needed)
    return {
        name: value
        for name, value in cache.items()
        if name not in ("method", "budget") and (name in needed or value != usual.get(name))
    }


@functools.cache
def _needed(method):
    """The options that a method cannot do without."""
    try:
        return [name for name, option in CacheConfig.option_table(method).items() if option.needed]
    except UsageError:
        return []


@functools.cache
def _usual(method, **needed):
    """The options of a method that is told no others; none of a method that is not here."""
    try:
        return CacheConfig(method, **needed).as_dict()
    except UsageError:
        return {}
