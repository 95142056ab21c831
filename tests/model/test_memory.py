"""Memory figures against allocations of known size and against files of /proc and /sys written by hand."""

import mmap
import sys

import pytest

from minillm import memory

MIB = 1 << 20


def test_resident_and_peak_follow_an_allocation():
    before, peak_before = memory.resident_memory(), memory.peak_memory()
    if before is None:
        pytest.skip("this system does not tell")
    block = mmap.mmap(-1, 256 * MIB)
    for offset in range(0, len(block), 4096):  # memory counts once it is touched
        block[offset] = 1
    during = memory.resident_memory()
    block.close()
    after = memory.resident_memory()
    assert 250 * MIB < during - before < 270 * MIB
    assert after < during - 250 * MIB
    assert memory.peak_memory() >= max(during - 4 * MIB, peak_before)  # the kernel's peak lags by some pages


def test_available_is_of_the_size_of_a_machine():
    available = memory.available_memory()
    assert available is None or 16 * MIB < available < 1 << 46


def test_available_is_the_smaller_of_machine_and_cgroup(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory, "_proc_field", lambda *_: 8 << 30)
    for room, expected in ((3 << 30, 3 << 30), (9 << 30, 8 << 30), (None, 8 << 30), (0, 0)):
        monkeypatch.setattr(memory, "_cgroup_room", lambda room=room: room)
        assert memory.available_memory() == expected


def test_proc_field(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:       24689764 kB\nMemAvailable:   1234 kB\n")
    assert memory._proc_field("meminfo", "MemAvailable", tmp_path) == 1234 * 1024
    assert memory._proc_field("meminfo", "Mem", tmp_path) is None
    assert memory._proc_field("absent", "MemTotal", tmp_path) is None


def write_group(folder, limit, use, stat, *, version):
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, use), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text("".join(f"{key} {value}\n" for key, value in stat.items()))


def test_cgroup_v2_takes_the_tightest_level(tmp_path):
    membership = tmp_path / "self"
    membership.write_text("0::/jobs/mine\n")
    mount = tmp_path / "cgroup"
    write_group(mount / "jobs", 1000, 700, {"anon": 400, "inactive_file": 250}, version=2)
    write_group(mount / "jobs/mine", "max", 600, {"inactive_file": 0}, version=2)
    assert memory._cgroup_room(mount, membership) == 1000 - 700 + 250
    write_group(mount / "jobs/mine", 620, 600, {"inactive_file": 0}, version=2)
    assert memory._cgroup_room(mount, membership) == 20
    write_group(mount / "jobs/mine", 620, 640, {"inactive_file": 0}, version=2)
    assert memory._cgroup_room(mount, membership) == 0


def test_cgroup_v1_inside_a_container_whose_path_is_the_hosts(tmp_path):
    membership = tmp_path / "self"
    membership.write_text("8:pids:/\n4:cpu,memory:/docker/0123\n1:name=systemd:/\n")
    mount = tmp_path / "cgroup"
    write_group(mount / "memory", 5000, 4000, {"total_inactive_file": 100, "inactive_file": 7}, version=1)
    assert memory._cgroup_room(mount, membership) == 1100


def test_no_cgroup_and_no_limit(tmp_path):
    assert memory._cgroup_room(tmp_path, tmp_path / "absent") is None
    membership = tmp_path / "self"
    membership.write_text("0::/\n")
    assert memory._cgroup_room(tmp_path, membership) is None
    write_group(tmp_path, "max", 5, {}, version=2)
    assert memory._cgroup_room(tmp_path, membership) is None


def test_vm_stat_of_macos():
    text = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10.
Pages active:                           5000.
Pages inactive:                          100.
Pages speculative:                      1000.
Pages wired down:                      99999.
Pages purgeable:                           1.
"Translation faults":                1234567.
"""
    assert memory._vm_stat_available(text) == (10 + 100 + 1000 + 1) * 16384
    assert memory._vm_stat_available("") is None
