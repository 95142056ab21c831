"""Errors that a person can cause. Each message is one line that says what is wrong and what to do about it."""


class MinillmError(Exception):
    """The work cannot be done: a file is damaged, memory does not suffice, a model is not supported."""


class UsageError(MinillmError):
    """What was asked for makes no sense: an unknown option, a value out of range."""


class MemoryShort(MinillmError):
    """There is not enough memory now."""


class MemoryLimit(MemoryShort):
    """There is never enough: it takes `needed` bytes of cache and may have `limit`."""

    def __init__(self, message, needed, limit):
        super().__init__(message)
        self.needed, self.limit = needed, limit
