"""The results: one JSON object a line, a line a sample, appended as they are finished.

A process killed while it writes leaves at most its last line damaged; that line is cut off when the file is opened
again, and its sample is computed again."""

import json
import os
from pathlib import Path

from minillm.errors import MinillmError, UsageError

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two evaluations from writing to one file
    fcntl = None

KEY = ("task", "sample", "protocol", "model", "cache")  # everything that decides a row


def key(row):
    """What decides a row, as one text."""
    return json.dumps([row[name] for name in KEY], sort_keys=True)


def read_rows(path):
    """The rows of a file; -> (rows, bytes that are whole). Raises MinillmError where a line that is not the last is
    damaged."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    lines = data.split(b"\n")
    rows, whole = [], 0
    for number, line in enumerate(lines, 1):
        try:
            if number < len(lines) and line:
                row = json.loads(line)
                key(row)
                rows.append(row)
            elif line:  # written without its end
                break
        except (ValueError, KeyError, TypeError):
            if any(lines[number:]):
                raise MinillmError(
                    f"{path} is damaged in line {number}: delete that line, and its sample is computed again"
                ) from None
            break
        whole += len(line) + 1
    return rows, min(whole, len(data))


class Store:
    """The rows of a results file, open for more. `rows`: those there are."""

    def __init__(self, path, notice):
        """notice(text) is called where the file had to be repaired. Raises MinillmError and UsageError."""
        self.path = Path(path).expanduser()
        try:
            self.file = open(self.path, "ab", buffering=0)
        except OSError as error:
            raise UsageError(f"{self.path} cannot be written ({error.strerror}): name another file") from error
        self._lock()
        self.rows, whole = read_rows(self.path)
        self.keys = set(map(key, self.rows))
        if cut := self.path.stat().st_size - whole:
            self.file.truncate(whole)
            notice(f"{self.path}: the last line was damaged and is cut off ({cut} bytes); its sample is computed again")

    def _lock(self):
        if fcntl:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(f"{self.path} is being written by another evaluation: name another file") from None

    def __contains__(self, row):
        return key(row) in self.keys

    def add(self, row):
        """Append a row in one write."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            written = os.write(self.file.fileno(), line)
        except OSError as error:
            raise MinillmError(f"{self.path} cannot be written: {error.strerror}; what is done is kept") from error
        if written < len(line):
            raise MinillmError(f"{self.path} cannot be written: the disk is full; what is done is kept")
        self.rows.append(row)
        self.keys.add(key(row))

    def close(self):
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
