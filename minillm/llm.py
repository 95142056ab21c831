"""LLM: a model and its cache memory, from a name to text."""

import asyncio
import copy
import math
import operator
import reprlib
import time
import weakref
from functools import cached_property

import numpy as np

from minillm import likelihood, ops, questions
from minillm.cache.kv_cache import KVCache
from minillm.cache.page_pool import PagePool
from minillm.compress.compressor import Compressor
from minillm.compress.config import CacheConfig
from minillm.constraint import Matchers
from minillm.document import Document
from minillm.engine.admission import asked_dtype, cache_bytes, fitting_dtype, in_entries, require, require_room
from minillm.engine.engine import Engine
from minillm.errors import MinillmError, UsageError
from minillm.files import hub
from minillm.files.formats import BF16
from minillm.files.profile_file import find as find_profile
from minillm.files.stored_model import open_model, tensor_shapes
from minillm.files.weights import Weight, load_weights
from minillm.model import Model
from minillm.sampling import SamplingParams
from minillm.session import Session, is_chat
from minillm.text.tokenizer import Tokenizer


class LLM:
    """A loaded model. A context manager: its memory goes back on `close`.

    Any number of threads and asyncio tasks may use one: each answer is what it is alone, and those that wait together
    are decoded together. A Session is used by one at a time.

    Wherever a prompt goes in, it is text (completed as it stands; special tokens in it are recognised), a list of
    token ids, or a list of chat messages ({"role", "content"}) for the model's chat template."""

    weights_digest = None  # StoredModel.digest; None: they were not loaded from files

    def __init__(self, config, model, tokenizer, cache, context, dtype, stop_ids, profile=None, cache_limit=None):
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.context, self.dtype, self.stop_ids = context, dtype, stop_ids
        self.engine, self.sessions = Engine(), weakref.WeakSet()
        self.pools, self.cache_limit = {}, cache_limit  # dtype -> PagePool, each of so many bytes
        self.load_seconds = 0.0
        self.profile = profile  # whose scores the model predicts already
        self.set_cache(cache)

    def set_profile(self, profile):
        """Predict scores by another Profile of this model from now on, which decides anew what the cache asked for
        comes to. MinillmError where that is a quality that the profile does not know; then nothing is changed."""
        self._asked.resolve(profile, self.config.name)
        model = copy.copy(self.model)  # the same weights: sessions under way keep the scores that they began with
        model.blocks = [copy.copy(block) for block in model.blocks]
        with self.engine.alone():
            model.predict(*profile.projection)
        self.profile, self.model = profile, model
        self.set_cache(self._asked)

    def set_cache(self, cache):
        """Compress with another CacheConfig from now on. Sessions that exist go on with theirs."""
        self.compressor = self.compressor_for(cache)
        self._asked, self.cache_config = cache, self.compressor.config

    def compressor_for(self, cache):
        """The Compressor of a CacheConfig and this model."""
        cache = in_entries(cache, self.model.ops, self.config.head_dim)
        recipe = cache.resolve(self.profile, self.config.name)
        cache = recipe.config
        classes = np.zeros(self.config.vocab_size, np.uint8)
        if self.tokenizer and cache.method != "full":  # a look at every token, 0.05 s, for what is never compressed
            known = self.tokenizer.delimiter_classes(cache.options.get("delimiters", "default"))
            classes[: len(known)] = known[: len(classes)]
        worth = None if self.profile is None else np.exp(self.profile.worth)
        digest, asked = self.profile and self.profile.digest, self.asked if recipe.options.get("asked") else ()
        return Compressor(recipe, self.model, classes, worth, digest, asked)

    @cached_property
    def asked(self):
        """Token ids of general questions about a text and beginnings of answers, which come after it; none without a
        tokenizer, or without rows of the embedding for them."""
        ids = self.tokenizer.encode(questions.talk(self.tokenizer), bos=False) if self.tokenizer else []
        return [] if self._not_embedded(ids) else ids

    @property
    def pool(self):
        """The PagePool of new sessions."""
        return self.pool_of(self.cache_config.dtype)

    def pool_of(self, dtype):
        if dtype not in self.pools:
            pool = PagePool(self.model.ops, self.config.head_dim, dtype=dtype, limit=self.cache_limit)
            self.pools.setdefault(dtype, pool)
        return self.pools[dtype]

    def new_cache(self, window=None, dtype=None):
        """An empty KVCache. window: see there; dtype: None: of this model's CacheConfig."""
        pool = self.pool_of(dtype or self.cache_config.dtype)
        return KVCache(pool, self.config.n_layers, self.config.n_kv_heads, window)

    def trim(self):
        """Give what no sequence holds back to the system."""
        with self.engine.alone():
            for pool in self.pools.values():
                pool.trim()

    @classmethod
    def load(
        cls,
        model=None,
        *,
        cache=None,
        context=None,
        device="auto",
        dtype="auto",
        quantize=None,
        threads=None,
        chat_template=None,
        profile=None,
        cache_limit=None,
        offline=False,
        progress=False,
    ):
        """The model of a folder, a .gguf file or a Hub repository; None: the default model.

        cache: CacheConfig. context: longest sequence in tokens (default: the model's). dtype: how weights are held:
        "float32" (widened at load), "stored" (as in the file, widened tile by tile on every use: slow, small), "auto"
        (float32 where it fits). quantize: "q8_0" or "q4_0" turns 16- and 32-bit weights into such blocks instead, the
        head (and an embedding that is the head) always into q8_0. threads: of the linear algebra library.
        chat_template: a name or a text in place of the model's. profile: a file of python -m minillm.profile (None: the
        model's own, where there is one; False: none). cache_limit: bytes that caches of one page format may take; who
        does not fit waits (None: the free memory). progress: bars on a terminal's stderr. Raises MinillmError."""
        start = time.perf_counter()
        cache = CacheConfig() if cache is None else cache
        dtype = asked_dtype(dtype, quantize)
        backend = ops.backend(device, threads)
        stored = open_model(hub.resolve(model, offline=offline, progress=progress))
        tokenizer = Tokenizer.of(stored, chat_template)
        dtype = fitting_dtype(stored, dtype, backend)
        require_room(stored, dtype, backend, cache, context)
        digest = stored.digest  # before the weights: the pages it looks at are given back with theirs
        profile = None if profile is False else find_profile(stored, profile)
        weights = load_weights(stored, dtype=dtype, progress=progress)
        model = Model(stored.config, weights, backend, profile and profile.projection)
        stop_ids = frozenset(stored.config.eos_ids) | (tokenizer.stop_ids if tokenizer else frozenset())
        context = context or stored.config.context
        llm = cls(stored.config, model, tokenizer, cache, context, dtype, stop_ids, profile, cache_limit)
        llm.weights_digest, llm.load_seconds = digest, time.perf_counter() - start
        return llm

    @classmethod
    def random(cls, config, *, cache=None, device="auto", seed=0):
        """A model of a ModelConfig with random bf16 weights, made on the device: what it says is noise, what it takes
        of time and memory is what any such model takes. No tokenizer: prompts are token ids."""
        start = time.perf_counter()
        backend = ops.backend(device)
        shapes = tensor_shapes(config)
        require(backend, f"a random {config.name}", 0, weights=2 * sum(map(math.prod, shapes.values())))
        weights = {}
        for number, (name, shape) in enumerate(shapes.items()):
            if len(shape) == 1:
                weights[name] = Weight.floats(np.full(shape, name.endswith("norm.weight"), np.float32))
            else:
                words = backend.random_words(shape, seed * len(shapes) + number)
                weights[name] = Weight(BF16, words, shape)
        model = Model(config, weights, backend)
        llm = cls(config, model, None, cache or CacheConfig(), config.context, "stored", frozenset(config.eos_ids))
        llm.load_seconds = time.perf_counter() - start
        return llm

    def encode(self, prompt, bos=True):
        """Token ids of a prompt (text, ids or messages), each a row of the embedding. UsageError for what is none of
        these and for ids out of range; MinillmError where the text has a token that the model has no row for."""
        if is_chat(prompt):
            prompt = self._needs_tokenizer().render_chat(prompt)
        if isinstance(prompt, str):
            tokenizer = self._needs_tokenizer()
            ids = tokenizer.encode(prompt, bos=bos)
            if beyond := self._not_embedded(ids):
                raise MinillmError(
                    f"the text has the token {tokenizer.token_bytes(beyond[0]).decode(errors='replace')!r}, whose id "
                    f"{beyond[0]} is not in 0..{self.config.vocab_size - 1}, what {self.config.name} has embeddings "
                    "for: leave it out of the text, or take the tokenizer that belongs to this model"
                )
            return ids
        try:
            ids = [operator.index(token) for token in prompt]
        except TypeError:
            raise UsageError(
                f"{reprlib.repr(prompt)} is no prompt: give a text, a list of token ids (whole numbers), or a list of "
                'chat messages ({"role": ..., "content": ...})'
            ) from None
        self.check_ids(ids)
        return ids

    def matcher(self, params):
        """The Matcher of an answer by SamplingParams, or None without a constraint. UsageError for params that cannot
        be followed here."""
        self.check_ids([token for token, _ in params.logit_bias], "logit_bias: ")
        return self.matchers.matcher(params.constraint) if params.constraint else None

    @cached_property
    def matchers(self):
        """Matchers of this model's vocabulary, made for the first constraint."""
        return Matchers(self._needs_tokenizer(), self.config.vocab_size, self.stop_ids)

    def check_ids(self, ids, where=""):
        """Raise UsageError, which begins with `where`, if one of them is no row of the embedding."""
        if beyond := self._not_embedded(ids):
            raise UsageError(f"{where}token id {beyond[0]} is not in 0..{self.config.vocab_size - 1}")

    def _not_embedded(self, ids):
        return [token for token in ids if not 0 <= token < self.config.vocab_size]

    def render_chat(self, messages):
        """The text of chat messages, by the model's chat template."""
        return self._needs_tokenizer().render_chat(messages)

    def session(self, compressor=None):
        """A Session: a conversation whose later turns read only their own tokens. compressor: in place of this LLM's,
        of `compressor_for`."""
        return Session(self, compressor)

    def read(self, prompt, cache=None, progress=None):
        """A Document: text or chat messages (or token ids) that are compressed now, and asked later. cache: CacheConfig
        in place of this LLM's."""
        session = Session(self, cache and self.compressor_for(cache))
        session.feed_document(prompt)
        session.settle(progress)
        return Document(session)

    def document(self, path, cache=None):
        """The Document that was saved in a file."""
        session = Session(self, cache and self.compressor_for(cache))
        session.restore(path)
        return Document(session)

    def stream(self, prompt, params=None, progress=None):
        """Yields the Pieces of the answer to a prompt as they are generated. The cache memory goes back at the end."""
        session = self.session()
        try:
            session.feed(prompt)
            yield from session.stream(params or SamplingParams(), progress)
        finally:
            session.close()

    def generate(self, prompt, params=None):
        """The text of the answer to a prompt."""
        return self.generate_batch([prompt], params)[0]

    def generate_batch(self, prompts, params=None):
        """The texts of the answers to a list of prompts, which are decoded together. Raises what the first that failed
        did with, once the others are done."""
        if isinstance(prompts, str):
            raise UsageError(f"generate_batch takes a list of prompts and got one text: write [{prompts!r}]")
        sessions = [self.session() for _ in prompts]
        try:
            for session, prompt in zip(sessions, prompts, strict=True):
                session.feed(prompt)
            requests = [session.request(params or SamplingParams()) for session in sessions]
            self.engine.run(requests)
            for request in requests:
                if request.error is not None:
                    raise request.error
            return [request.text for request in requests]
        finally:
            for session in sessions:
                session.close()

    async def astream(self, prompt, params=None):
        """`stream` for asyncio: other tasks go on meanwhile."""
        session, request = self.session(), None
        try:
            await asyncio.to_thread(session.feed, prompt)
            request = session.request(params or SamplingParams())
            request.pull = True
            self.engine.submit(request)
            while True:
                await self.engine.arrival(request)
                if (piece := request.pop()) is None:
                    return
                yield piece
        finally:  # also where the task is cancelled once more meanwhile
            leaving = asyncio.get_running_loop().run_in_executor(None, self._leave, session, request)
            await asyncio.shield(leaving)

    def _leave(self, session, request):
        if request:
            self.engine.cancel(request)
        session.close()

    async def agenerate(self, prompt, params=None):
        """`generate` for asyncio: other tasks go on meanwhile."""
        return "".join([piece.text async for piece in self.astream(prompt, params)])

    def logits(self, token_ids):
        """float32 (n, vocab): the next-token logits after each of the token ids, with the full cache."""
        return likelihood.logits(self, token_ids)

    def logprobs(self, prompt, top=0):
        """How likely a prompt is: of each of its tokens the Logprob after those before it, with the `top` likeliest at
        its place; None of the first token, which nothing is before. Read with the full cache."""
        return likelihood.of_prompt(self, prompt, top)

    def cache_bytes(self, n):
        """About the bytes of the pages of n tokens, at the budget of this cache."""
        return cache_bytes(self.config, self.cache_config, self.model.ops, n)

    def close(self):
        """Give the memory of weights and caches back. Answers that are on the way fail."""
        self.engine.close()
        with self.engine.alone():
            for pool in self.pools.values():
                for cache in list(pool.caches):
                    cache.clear()
            self.model = self.compressor = _Closed()  # which has matrices too
            for session in list(self.sessions):
                session.compressor, session.answer = self.compressor, None
            self.trim()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _needs_tokenizer(self):
        if self.tokenizer is None:
            raise MinillmError(f"{self.config.name} has no tokenizer: add its tokenizer.json, or give token ids")
        return self.tokenizer


class _Closed:
    """Stands where the model and the compressor of a closed LLM were."""

    def __getattr__(self, name):
        raise MinillmError("this LLM is closed and its memory given back: load it again")
