"""Errors that a person can cause. Each message is one line that says what is wrong and what to do about it."""


class MinillmError(Exception):
    """The work cannot be done: a file is damaged, memory does not suffice, a model is not supported."""


class UsageError(MinillmError):
    """What was asked for makes no sense: an unknown option, a value out of range."""
