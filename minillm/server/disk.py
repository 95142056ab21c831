"""Disk: snapshots that had no room in memory, a file each, named by the key."""

import contextlib
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minillm.cache import state as cache_state
from minillm.cache.kv_cache import KVCache
from minillm.errors import MinillmError, UsageError
from minillm.files import own_file

PENDING = 4  # snapshots that may wait to be written; more are given up: the disk is too slow for them
ABANDONED = 3600.0  # seconds after which a file that was not written to its end is nobody's
log = logging.getLogger("minillm.server")


class Disk:
    """A folder of snapshots, which several servers may have together. Files are written by a thread of its own, whole
    or not at all; where they take more than `limit` bytes, those that were not used for longest go."""

    def __init__(self, folder, limit):
        """Raises UsageError where the folder cannot be written to."""
        self.folder, self.limit = Path(folder).expanduser(), limit
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--cache-disk {folder} cannot be made ({error.strerror}): name a folder") from None
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise UsageError(f"--cache-disk {folder} cannot be written to: name another folder")
        self.writer, self.pending = ThreadPoolExecutor(1, "minillm-disk"), {}
        for path in self.folder.glob("*.kv.*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()

    def path(self, key):
        return self.folder / f"{key.hex()}.kv"

    def put(self, key, cache):
        """Have a KVCache written. -> whether it will be"""
        if key in self.pending or self.path(key).is_file():
            return True
        if len(self.pending) >= PENDING:
            return False
        self.pending[key] = cache_state.state(cache)
        self.writer.submit(self._write, key)
        return True

    def _write(self, key):
        try:
            own_file.write(self.path(key), self.pending[key], {"minillm_prefix": key.hex()})
            self._bound()
        except MinillmError as error:
            log.warning("a prefix was not kept: %s", error)
        finally:
            del self.pending[key]

    def _bound(self):
        """Delete the files that were not used for longest, while all take more than the limit."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _files(self):
        """Yields (seconds of its last use, bytes, path)."""
        for path in self.folder.glob("*.kv"):
            with contextlib.suppress(OSError):  # another server has deleted it
                stat = path.stat()
                yield stat.st_mtime, stat.st_size, path

    @property
    def bytes_in_use(self):
        return sum(size for _, size, _ in self._files())

    def get(self, key, like, compressor):
        """A KVCache like another (of its pool and model) that holds the snapshot, or None. A file that is damaged is
        deleted, and raises MinillmError."""
        path = self.path(key)
        arrays = self.pending.get(key)
        if arrays is None and not path.is_file():
            return None
        cache = KVCache(like.pool, *like.lengths.shape, like.window)
        try:
            if arrays is None:
                arrays, texts = own_file.read(path, "prefix", "it is deleted")
                if texts["minillm_prefix"] != key.hex():
                    raise ValueError("it is another prefix")
            compressor.check_left(arrays, compressor.model.config.n_heads)
            cache_state.restore(cache, arrays)
        except (KeyError, ValueError, MinillmError) as error:
            path.unlink(missing_ok=True)
            raise MinillmError(f"{path} is damaged and deleted: {error}") from None
        with contextlib.suppress(OSError):
            os.utime(path)
        return cache

    def delete(self, key):
        self.wait()  # it may be about to be written
        self.path(key).unlink(missing_ok=True)

    def wait(self):
        """Wait for what is being written."""
        self.writer.submit(int).result()

    def close(self):
        self.writer.shutdown()
