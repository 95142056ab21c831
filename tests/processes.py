"""Processes that a process has started."""

from pathlib import Path


def descendants(pid):
    """Process ids below `pid`, with their command lines."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            words = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append((int(stat.parent.name), words))
    found, open_ = [], [pid]
    while open_:
        below = children.get(open_.pop(), [])
        found += below
        open_ += [child for child, _ in below]
    return found
