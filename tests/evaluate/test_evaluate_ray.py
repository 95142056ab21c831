"""A local Ray of two workers, one of which is killed. Not among the other tests, for Ray is large:

pip install -e ".[dev,ray]" && python -m pytest -m ray
"""

import os
import signal

import pytest
import tiny_chat
from paths import TESTS
from processes import descendants

from minillm.compress.config import CacheConfig
from minillm.errors import UsageError
from minillm.evaluate import workers
from minillm.evaluate.evaluator import Job, Setup

pytestmark = pytest.mark.ray


def jobs(n, length=900):
    caches = CacheConfig("full").as_dict(), CacheConfig("streaming", 0.5).as_dict()
    return [
        Job("needle", {"kind": "noise", "length": length, "depth": None, "seed": seed}, "aware", {}, caches)
        for seed in range(n)
    ]


def test_a_killed_worker_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    setup = Setup(str(tiny_chat.make(tmp_path / "model")), threads=1)
    expected = {row["sample"]["seed"]: row for rows in workers.here(setup, jobs(60)) for row in rows}
    found, killed = [], None
    for rows in workers.on_ray(setup, jobs(60), "local", 2, 1, 0):
        found += rows
        if killed is None and len(found) > 20:
            pids = [pid for pid, words in descendants(os.getpid()) if words.startswith("ray::Evaluator")]
            assert len(pids) == 2
            killed = pids[0]
            os.kill(killed, signal.SIGKILL)
    assert killed and len(found) == 120
    assert {row["sample"]["seed"]: row for row in found} == expected


def test_an_error_in_a_worker_is_the_error(tmp_path):
    setup = Setup(str(tiny_chat.make(tmp_path / "model")), threads=1)
    with pytest.raises(UsageError, match="too short for a needle"):
        list(workers.on_ray(setup, jobs(2, length=90), "local", 1, 1, 0))


def test_no_cluster_at_this_address():
    with pytest.raises(UsageError, match="there is no Ray cluster"):
        list(workers.on_ray(Setup(), [], "auto", 1, 1, 0))
