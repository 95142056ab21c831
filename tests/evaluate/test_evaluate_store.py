"""The results file: resumable, whole after any kill, repaired where it is not."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from minillm.errors import MinillmError, UsageError
from minillm.evaluate.store import Store, key, read_rows


def row(i, **changes):
    decides = {"task": "needle", "sample": {"seed": i}, "protocol": "aware", "model": {"name": "m"}, "cache": {"a": 1}}
    return decides | {"scores": {"em": 1.0}} | changes


@pytest.fixture
def notices():
    return []


def write(path, *rows):
    with Store(path, pytest.fail) as store:
        for one in rows:
            store.add(one)


def test_rows_come_back_and_are_known(tmp_path, notices):
    write(tmp_path / "r.jsonl", row(0), row(1, prediction="é\n\u2028中"))
    with Store(tmp_path / "r.jsonl", notices.append) as store:
        assert store.rows == [row(0), row(1, prediction="é\n\u2028中")]
        assert row(1) in store and row(2) not in store
        store.add(row(2))
    assert len(read_rows(tmp_path / "r.jsonl")[0]) == 3
    assert not notices


@pytest.mark.parametrize("name", ["task", "sample", "protocol", "model", "cache"])
def test_everything_that_decides_a_row_is_in_its_key(name):
    changed = {"sample": {"seed": 0, "depth": 0.5}, "model": {"name": "m", "sha256": "x"}, "cache": {"a": 2}}
    assert key(row(0)) != key(row(0) | {name: changed.get(name, "other")})
    assert key(row(0)) == key(row(0, scores={}))
    reordered = json.loads(json.dumps(row(0), sort_keys=True))
    assert key(row(0)) == key(reordered)


@pytest.mark.parametrize("left", [1, 10, -2, -1])
def test_a_damaged_last_line_is_cut_off_with_a_notice(tmp_path, notices, left):
    """Any number of its bytes: also all but the end of the line, which is a whole object but was not finished."""
    path = tmp_path / "r.jsonl"
    write(path, row(0), row(1))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[: first + left] if left > 0 else whole[:left])
    with Store(path, notices.append) as store:
        assert store.rows == [row(0)]
        store.add(row(1))
    assert path.read_bytes() == whole
    assert len(notices) == 1 and "last line was damaged" in notices[0]


def test_a_last_line_of_zeros_or_of_another_program_is_cut_off(tmp_path, notices):
    path = tmp_path / "r.jsonl"
    for garbage in (b"\0" * 300, b'{"task": 1}\n', b"[1]\n"):
        write(path, row(0))
        with open(path, "ab") as file:
            file.write(garbage)
        with Store(path, notices.append) as store:
            assert store.rows == [row(0)]
        path.unlink()
    assert len(notices) == 3


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "r.jsonl"
    write(path, row(0), row(1), row(2))
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][:20], *lines[2:]]))
    before = path.read_bytes()
    with pytest.raises(MinillmError, match="line 2"):
        Store(path, pytest.fail)
    assert path.read_bytes() == before


def test_one_file_one_evaluation(tmp_path):
    with Store(tmp_path / "r.jsonl", pytest.fail):
        with pytest.raises(UsageError, match="another evaluation"):
            Store(tmp_path / "r.jsonl", pytest.fail)


def test_a_file_that_cannot_be(tmp_path):
    with pytest.raises(UsageError, match="cannot be written"):
        Store(tmp_path / "no" / "r.jsonl", pytest.fail)
    with pytest.raises(UsageError, match="cannot be read"):
        read_rows(tmp_path / "none.jsonl")


def test_killed_at_any_moment(tmp_path, notices):
    """A process that writes without rest is killed after ever more lines: what is there afterwards is whole rows, in
    order, and the next process goes on after them."""
    program = textwrap.dedent("""
        import sys
        from minillm.evaluate.store import Store
        with Store(sys.argv[1], print) as store:
            i = len(store.rows)
            while True:
                row = {"task": "t", "sample": {"seed": i}, "protocol": "p", "model": {}, "cache": {}}
                store.add(row | {"prediction": "x" * 20_000, "n": i})
                print(i, flush=True)
                i += 1
    """)
    path, seen = tmp_path / "r.jsonl", -1
    for n_lines in (1, 3, 10):
        with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True) as process:
            for _ in range(n_lines):
                seen = int(process.stdout.readline())
            os.kill(process.pid, signal.SIGKILL)
        with Store(path, notices.append) as store:
            assert [row["n"] for row in store.rows] == list(range(len(store.rows)))
            assert len(store.rows) > seen  # what was reported as written is there
