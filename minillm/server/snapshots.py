"""Snapshots: caches of prefixes that were read, for requests that begin in the same way.

A compressed cache cannot be cut back to any length, so a prefix is there only where reading has settled: at boundaries,
which follow from the request alone. So a request has the same cache whether a snapshot was found or not."""

import hashlib
import json
import logging
from collections import Counter, OrderedDict

import numpy as np

from minillm import session_file
from minillm.errors import MinillmError, UsageError
from minillm.session import SETTLED_FROM

KEPT = 4  # new snapshots of one request, its last ones
EVENTS = ("hit", "miss", "evict", "spill", "restore", "corrupt")
log = logging.getLogger("minillm.server")


def boundaries(prompt, compressor, explicit):
    """Numbers of tokens of a Prompt after which what was read settles. explicit: only where the client said so.

    Of the ends of all parts those that are SETTLED_FROM tokens after the one before. Methods that look at the newest
    tokens for what matters would lose what a question asks for: they settle only where the client says so."""
    try:
        compressor.check_settles()
    except UsageError:
        return []
    explicit = explicit or compressor.config.reads == "new"
    found = [0]
    for end, asked in prompt.ends:
        if (asked or not explicit) and end - found[-1] >= SETTLED_FROM and end < len(prompt.ids):
            found.append(end)
    return found[1:]


def keys(llm, compressor, ids, ends, salt):
    """The key of each boundary: a hash of all before it, of the model and the cache's settings, and of a salt."""
    try:
        about = session_file.identity(llm, compressor)
    except MinillmError:  # a model without files: it has no other name
        about = compressor.config.as_dict()
    key = hashlib.sha256(json.dumps([about, salt], default=str).encode()).digest()
    found, start = [], 0
    for end in ends:
        tokens = np.asarray(ids[start:end], np.int64).tobytes()
        key = hashlib.sha256(key + len(tokens).to_bytes(8, "little") + tokens).digest()
        found.append(key)
        start = end
    return found


class Snapshots:
    """Caches by key, the one used last at the end. Touched by whoever owns the engine alone."""

    def __init__(self, limit, disk=None):
        """limit: bytes of the pages that they hold, each counted once; None: no limit. disk: a Disk for those that are
        too many."""
        self.limit, self.disk, self.caches = limit, disk, OrderedDict()
        self.events = Counter()  # of EVENTS

    def find(self, keys):
        """The cache of the last key that there is one of, or None."""
        for key in reversed(keys):
            if key in self.caches:
                self.caches.move_to_end(key)
                return self.caches[key]
        return None

    def restore(self, keys, request):
        """The cache of the last key that there is a file of, for a Request that has the memory; or None."""
        for key in reversed(keys) if self.disk else ():
            try:
                cache = self.disk.get(key, request.cache, request.compressor)
            except MinillmError as error:
                log.warning("%s", error)
                self.events["corrupt"] += 1
                continue
            if cache is not None:
                self.events["restore"] += 1
                return cache
        return None

    def keep(self, key, cache):
        """Have a fork of a cache."""
        if key not in self.caches:
            self.caches[key] = cache.fork()
        self.caches.move_to_end(key)
        while self.limit is not None and self.caches and self.bytes_in_use > self.limit:
            self.drop()

    def drop(self):
        """Give the one that was not used for longest back."""
        key, cache = self.caches.popitem(last=False)
        spilt = self.disk is not None and self.disk.put(key, cache)
        self.events["spill" if spilt else "evict"] += 1
        cache.clear()

    def forget(self, key):
        """Have neither a cache nor a file of it any more."""
        if cache := self.caches.pop(key, None):
            cache.clear()
        if self.disk:
            self.disk.delete(key)

    def close(self):
        """Give all back, to the disk if there is one."""
        while self.caches:
            if self.disk:
                self.disk.wait()
            self.drop()
        if self.disk:
            self.disk.close()

    @property
    def bytes_in_use(self):
        """Of the pages that they hold, each counted once."""
        pages = {}
        for cache in self.caches.values():
            pages.setdefault(cache.pool, []).append(cache.held_pages)
        return sum(len(np.unique(np.concatenate(held))) * pool.page_bytes for pool, held in pages.items())


class Prefix:
    """The boundaries of one prompt, and what a Request asks about them."""

    def __init__(self, snapshots, ends, keys, write):
        """write: whether to look for snapshots and to keep new ones; without, the prompt only settles."""
        self.snapshots, self.ends, self.keys, self.write = snapshots, ends, keys, write

    def attach(self, request):
        request.settles = tuple(self.ends)
        if self.write:
            request.look, request.settled = self.look, self.settled

    def look(self, request):
        """Take the longest prefix that somebody has read, if it is longer than what the request has."""
        seen = request.cache.seen
        longer = [key for end, key in zip(self.ends, self.keys, strict=True) if end > seen]
        cache = self.snapshots.find(longer)
        if cache is not None:
            request.take_up(cache)
        elif request.state == "reading" and (cache := self.snapshots.restore(longer, request)):
            request.take_up(cache)
            self.snapshots.keep(self.keys[self.ends.index(cache.seen)], cache)
            cache.clear()

    def settled(self, cache):
        at = self.ends.index(cache.seen)
        if at >= len(self.ends) - KEPT:
            self.snapshots.keep(self.keys[at], cache)
