"""Rows are the same whoever computes them, and nothing is lost with a worker that is killed."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_chat
from processes import descendants

from minillm.compress.config import CacheConfig
from minillm.errors import MinillmError, UsageError
from minillm.evaluate import workers
from minillm.evaluate.evaluator import Evaluator, Job, Setup, identify, ready_methods

# 900 bytes and two configurations: some milliseconds a job.
NEEDLES = "needle --task noise --length 900 --kv-method streaming --kv-budget 0.5 -s 5".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_chat.make(tmp_path_factory.mktemp("model") / "model"))


def command(model, out, *flags):
    return [sys.executable, "-m", "minillm.evaluate", *NEEDLES, "-m", model, "--out", str(out), *flags]


def rows_of(path):
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return {json.dumps([row["sample"], row["cache"]], sort_keys=True): row for row in rows}, len(rows)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for its workers in /proc")
def test_a_killed_process_loses_nothing(model, tmp_path):
    n = 30
    one_thread = command(model, tmp_path / "alone.jsonl", "-n", str(n), "-t", "1")  # as the workers: the same rounding
    alone = subprocess.run(one_thread, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    shared = command(model, tmp_path / "shared.jsonl", "-n", str(n), "--workers", "2", "-t", "1")
    with subprocess.Popen(shared, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        out = tmp_path / "shared.jsonl"
        while not (out.exists() and out.stat().st_size) and process.poll() is None:
            time.sleep(0.01)
        pids = [pid for pid, words in descendants(process.pid) if "spawn_main" in words]
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGKILL)
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    assert "a worker was killed" in errors
    (one, n_one), (other, n_other) = rows_of(tmp_path / "alone.jsonl"), rows_of(out)
    assert n_one == n_other == 2 * n
    assert one == other


def test_an_evaluation_goes_on_where_it_was_killed(model, tmp_path):
    out = tmp_path / "r.jsonl"
    with subprocess.Popen(command(model, out, "-n", "15"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not (out.exists() and out.read_bytes().count(b"\n") >= 5) and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
    n_before = out.read_bytes().count(b"\n")
    assert 5 <= n_before < 30
    before = out.read_bytes()[: -1 if out.read_bytes().endswith(b"\n") else None].split(b"\n")[:n_before]
    again = subprocess.run(command(model, out, "-n", "15"), capture_output=True, text=True)
    assert again.returncode == 0 and f"{n_before} results are there, {30 - n_before} are to be computed" in again.stderr
    rows, n = rows_of(out)
    assert n == len(rows) == 30
    assert out.read_bytes().split(b"\n")[:n_before] == before
    third = subprocess.run(command(model, out, "-n", "15"), capture_output=True, text=True)
    assert "30 results are there, 0 are to be computed" in third.stderr and third.stdout == again.stdout


def test_an_error_in_a_worker_is_the_error(model):
    """Not a broken pool: what was wrong, in one line."""
    setup = Setup(model, threads=1)
    job = Job(
        "needle",
        {"kind": "noise", "length": 90, "depth": None, "seed": 0},
        "aware",
        {},
        (CacheConfig("full").as_dict(),),
    )
    with pytest.raises(UsageError, match="too short for a needle"):
        list(workers.here(setup, [job]))
    with pytest.raises(UsageError, match="too short for a needle"):
        list(workers.processes(setup, [job] * 3, 2, pytest.fail))


def test_workers_that_die_at_once_are_given_up(model):
    def jobs():
        return [Suicide("needle", {}, "aware", {}, ())]

    notices = []
    with pytest.raises(MinillmError, match="killed 3 times before one sample was done"):
        list(workers.processes(Setup(model, threads=1), jobs(), 1, notices.append))
    assert len(notices) == 2


class Suicide(Job):
    """Kills the process that gets it."""

    def __setstate__(self, state):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_row_has_what_it_takes_to_repeat_it(model):
    setup, config = Setup(model, threads=1), CacheConfig("semanticache", 0.3)
    sample = {"kind": "noise", "length": 900, "depth": 0.5, "seed": 3}
    row = Evaluator(setup).run(Job("needle", sample, "agnostic", identify(setup), (config.as_dict(),)))[0]
    assert row["cache"] == config.as_dict() and row["sample"] == sample and row["protocol"] == "agnostic"
    assert row["model"]["name"] == "model" and len(row["model"]["sha256"]) == 16
    assert row["kept"] == pytest.approx(0.3, abs=0.01)
    assert set(row["versions"]) == {"minillm", "python", "numpy", "backend", "cache_dtype"}
    assert row["tokens"]["context"] + row["tokens"]["question"] > 850
    json.dumps(row)


@pytest.mark.parametrize("name", ready_methods("a profile"))
def test_a_job_of_any_method_reaches_a_worker(name):
    cache = CacheConfig(name).as_dict()
    job = pickle.loads(pickle.dumps(Job("needle", {}, "aware", {}, (cache,))))
    assert CacheConfig(**job.caches[0]).as_dict() == cache


def test_a_model_is_known_by_its_files(tmp_path):
    first, same = (identify(Setup(str(tiny_chat.make(tmp_path / name / "model")))) for name in "ab")
    assert first == same
    other = identify(Setup(str(tiny_chat.make(tmp_path / "c" / "model", seed=8))))
    settings = identify(Setup(str(tiny_chat.make(tmp_path / "d" / "model", rms_norm_eps=1e-6))))
    assert len({m["sha256"] for m in (first, other, settings)}) == 3
    (tmp_path / "b" / "model" / "chat_template.jinja").write_text("{{ messages }}")
    assert identify(Setup(str(tmp_path / "b" / "model")))["sha256"] != first["sha256"]
    assert identify(Setup(str(tmp_path / "a" / "model"), dtype="stored")) != first
