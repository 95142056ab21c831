"""How much memory is free and how much this process uses, in bytes, with the standard library alone."""

import ctypes
import os
import sys
from pathlib import Path


def available_memory() -> int | None:
    """What this process could still allocate without swapping; None where the system does not say.

    On Linux the smaller of what the machine has and what the control group of this process (a container, a batch job)
    may still take.
    """
    if sys.platform == "win32":
        return _windows_available()
    if sys.platform == "darwin":
        return _vm_stat_available(_output("vm_stat"))
    return min((n for n in (_proc_field("meminfo", "MemAvailable"), _cgroup_room()) if n is not None), default=None)


def resident_memory() -> int | None:
    """What this process has in memory now, resident pages of mapped files included; None where nothing says so."""
    if sys.platform == "win32":
        return _windows_process()[0]
    if sys.platform == "darwin":
        kib = _output("ps", "-o", "rss=", "-p", str(os.getpid())).strip()
        return int(kib) * 1024 if kib.isdigit() else None
    return _proc_field("self/status", "VmRSS")


def peak_memory() -> int:
    """The most this process has had in memory so far, resident pages of mapped files included."""
    if sys.platform == "win32":
        return _windows_process()[1]
    # Not ru_maxrss on Linux: there a process starts with the peak of the one that started it.
    if peak := _proc_field("self/status", "VmHWM"):
        return peak
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


# Linux


def return_freed_memory() -> None:
    """Have the C library give what was freed back to the operating system. glibc would keep it: after a long prompt,
    tens of MB of activations."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none, and keeps little
        if trim:
            trim(0)


def _proc_field(file: str, field: str, proc: Path = Path("/proc")) -> int | None:
    """The line `field: 123 kB` of a file in /proc, as 125952."""
    try:
        lines = (proc / file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def _cgroup_room(mount: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Limit minus use in the tightest control group that holds this process; None without a limit.

    A limit may sit at any level, so the way from the process's own group up to the root is walked. Inside a container
    the path in `membership` is often the host's and does not exist; then only its root, the container itself, counts.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    rooms = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":  # version 2: "0::/user.slice/session"
            base, files = mount, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):  # version 1: "9:memory:/docker/0123"
            base = mount / "memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.strip("/")
        rooms += [_room(folder, *files) for folder in (group, *group.parents) if folder.is_relative_to(base)]
    return min((room for room in rooms if room is not None), default=None)


def _room(folder: Path, limit_file: str, use_file: str, reclaimable: str) -> int | None:
    try:
        limit = int((folder / limit_file).read_text())  # ValueError: "max"
        use = int((folder / use_file).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # Files read once are counted as use, but the kernel drops them before it refuses anything.
    return max(0, limit - use + int(stat.get(reclaimable, 0)))


# macOS


def _output(*command: str) -> str:
    import subprocess

    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _vm_stat_available(text: str) -> int | None:
    """`Pages free: 123.` and the other kinds that can be had at once, times the page size of the first line."""
    pages = dict(line.rstrip(".").split(":") for line in text.splitlines()[1:] if ":" in line)
    kinds = ("Pages free", "Pages inactive", "Pages speculative", "Pages purgeable")
    if "Pages free" not in pages or "page size of" not in text:
        return None
    page_size = int(text.split("page size of", 1)[1].split()[0])
    return page_size * sum(int(pages.get(kind, 0)) for kind in kinds)


# Windows


def _windows_available() -> int | None:

    class MemoryStatus(ctypes.Structure):  # MEMORYSTATUSEX
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong)
            for name in ("total", "available", "total_page", "free_page", "total_virtual", "free_virtual", "extended")
        ]

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    return status.available if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else None


def _windows_process() -> tuple[int, int]:
    """Working set of this process: now, and at its largest."""

    class MemoryCounters(ctypes.Structure):  # PROCESS_MEMORY_COUNTERS
        _fields_ = [("size", ctypes.c_ulong), ("page_faults", ctypes.c_ulong)] + [
            (name, ctypes.c_size_t)
            for name in ("peak", "now", "peak_paged", "paged", "peak_other", "other", "pagefile", "peak_pagefile")
        ]

    counters = MemoryCounters(size=ctypes.sizeof(MemoryCounters))
    process = ctypes.c_void_p(-1)  # the pseudo handle of the current process
    ctypes.windll.kernel32.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.size)
    return counters.now, counters.peak
