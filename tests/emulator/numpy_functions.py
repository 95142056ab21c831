"""Which NumPy functions work on CuPy's arrays, and how: what the emulator's arrays allow. Checked against the sources
of CuPy 14 and 15 (cupy/_core/core.pyx: __array_ufunc__, __array_function__; the function's own file). NumPy hands them
on to CuPy, which has its own of the same name; what it lacks, or takes in another way, fails there and must fail here.
(numpy.ones and numpy.full with like= are among that: NumPy 2 hands on a `device` that CuPy's do not take.)"""

import numpy as np

UFUNCS = set(
    "absolute add bitwise_and bitwise_or bitwise_xor divide equal exp floor_divide greater greater_equal invert "
    "left_shift less less_equal log logical_and logical_not logical_or matmul maximum minimum multiply negative "
    "not_equal power remainder right_shift rint sqrt square subtract".split()
)
UFUNC_KEYWORDS = {"out", "dtype"}
AT = {"add", "maximum", "minimum"}  # ufunc.at; add sums floats in an order that changes: of whole numbers it is exact


def _one(args, kwargs):
    return 1


def _several(n):
    return lambda args, kwargs: n


def _parts(args, kwargs):
    """concatenate and stack copy up to 8 arrays one by one."""
    return len(args[0]) if len(args[0]) <= 8 else 1


FUNCTIONS = {  # name -> (arguments by position, keywords beside them, kernels started, waits for the device)
    "all": (1, "axis", _one, 0),
    "any": (1, "axis", _one, 0),
    "amax": (2, "axis keepdims", _one, 0),
    "amin": (2, "axis keepdims", _one, 0),
    "arange": (2, "dtype", _one, 0),
    "argmax": (2, "axis", _one, 0),
    "argsort": (2, "axis kind", _several(6), 0),  # kind: "stable", which it always is
    "broadcast_to": (2, "", _several(0), 0),
    "clip": (3, "", _one, 0),
    "concatenate": (2, "axis", _parts, 0),
    "count_nonzero": (1, "axis", _one, 0),
    "cumsum": (2, "axis dtype", _several(2), 0),
    "diff": (1, "prepend append", _several(3), 0),
    "einsum": (9, "", _several(3), 0),
    "empty": (2, "dtype", _several(0), 0),
    "empty_like": (2, "dtype shape", _several(0), 0),
    "flatnonzero": (1, "", _several(4), 1),
    "full_like": (2, "dtype shape", _one, 0),
    "max": (2, "axis keepdims", _one, 0),
    "mean": (2, "axis dtype keepdims", _several(2), 0),
    "min": (2, "axis keepdims", _one, 0),
    "nan_to_num": (1, "nan posinf neginf", _one, 0),
    "norm": (2, "ord axis keepdims", _several(3), 0),
    "ones_like": (2, "dtype shape", _one, 0),
    "ravel": (1, "", _several(0), 0),
    "searchsorted": (3, "side", _one, 0),
    "solve": (2, "", _several(4), 1),
    "split": (3, "axis", _several(0), 0),
    "stack": (2, "axis", _parts, 0),
    "sum": (2, "axis dtype keepdims", _one, 0),
    "tile": (2, "", _one, 0),
    "transpose": (2, "", _several(0), 0),
    "var": (2, "axis ddof dtype", _several(3), 0),
    "where": (3, "", _one, 0),
    "zeros": (2, "dtype", _one, 0),
    "zeros_like": (2, "dtype shape", _one, 0),
}
ON_HOST = {"split", "broadcast_to", "tile"}  # whose second argument is a shape or a list


def check_ufunc(ufunc, method, inputs, kwargs):
    """Raise TypeError where CuPy would, or would be wrong."""
    known = AT if method == "at" else UFUNCS
    if method not in ("__call__", "at") or ufunc.__name__ not in known:
        raise TypeError(f"no numpy.{ufunc.__name__} ({method}) for device arrays")
    _check_keywords(ufunc.__name__, kwargs, UFUNC_KEYWORDS)
    for value in (*inputs, *kwargs.get("out", ())):
        _check_value(ufunc.__name__, value)


def check_function(function, args, kwargs):
    """(kernels started: a function of args and kwargs, waits). Raises TypeError where CuPy would."""
    name = function.__name__
    if name not in FUNCTIONS:
        raise TypeError(f"no numpy.{name} for device arrays in tests/emulator/numpy_functions.py")
    positional, keywords, launches, waits = FUNCTIONS[name]
    if len(args) > positional:
        raise TypeError(f"numpy.{name} takes {positional} arguments by position for device arrays")
    _check_keywords(name, kwargs, set(keywords.split()))
    if name == "argsort" and kwargs.get("kind", "stable") != "stable":
        raise TypeError("device arrays are sorted stably")
    if name == "where" and len(args) != 3:
        raise TypeError("numpy.where of device arrays takes three arguments")
    for i, value in enumerate((*args, *kwargs.values())):
        if not (i == 1 and name in ON_HOST):
            _check_value(name, value, nested=name in ("concatenate", "stack", "einsum"))
    return launches, waits


def _check_keywords(name, kwargs, known):
    if unknown := kwargs.keys() - known:
        raise TypeError(f"numpy.{name} of device arrays has no {', '.join(sorted(unknown))}")


def _check_value(name, value, nested=False):
    """A device array, one number, or the name of something; lists of device arrays where that is what it is about."""
    if isinstance(value, np.ndarray):
        raise TypeError(f"numpy.{name}: an array on the host meets one of the device")
    if isinstance(value, list | tuple):
        if not nested and not all(isinstance(part, int) for part in value):
            raise TypeError(f"numpy.{name}: a list in place of an array")
        for part in value:
            _check_value(name, part)
