"""tools/gpu_check.py on the emulated device and a small model: that it runs unattended and reports. What it measures
here is nothing."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import emulator
import pytest
from model_files import CONFIG

from minillm.ops import cuda_device, cuda_ops

if emulator.available():
    pytest.skip(emulator.available(), allow_module_level=True)


@pytest.fixture
def check(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", Path(__file__).parents[1] / "tools" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    device = emulator.EmulatedDevice()
    device.description = lambda: "emulator"
    monkeypatch.setattr(cuda_device, "open_device", lambda index: device)
    monkeypatch.setattr(module, "open_ops", cuda_ops.open_ops)
    module.small = replace(CONFIG, n_layers=1, head_dim=64, dim=64, vocab_size=72, context=512)
    return module


def test_ceilings_and_kernels(check):
    device = check.open_ops(0).device
    ceiling = check.ceilings(device, 1 << 16, 32)
    assert ceiling["read_bytes_per_s"] > 0
    timing = check.Kernels(device, check.small, ceiling)
    timing.products((1, 2))
    timing.attention(70, 40)
    timing.norm(8)
    timing.sampling(2)
    assert len(timing.rows) == 14 and all(row["us"] > 0 < row["share_of_floor"] for row in timing.rows.values())


def test_a_model_in_every_cache(check, tmp_path):
    report = check.Report(tmp_path / "gpu.json", 1000)
    report.results["run"] = {"card": "emulator"}
    check.CACHES = {name: check.CACHES[name] for name in ("full", "semanticache 20 %")}
    report.part("model", 1, check.model, 0, check.small, 1e9, (150,), (1, 2), report, 2)
    report.part("tests", 10_000, check.kernel_tests, 1)
    report.part("peer", 1, lambda: 1 / 0)
    rows = json.loads((tmp_path / "gpu.json").read_text())["model"]
    assert [(row["cache"], row["batch"]) for row in rows[:-1]] == [(name, b) for name in check.CACHES for b in (1, 2)]
    full, _, small, _ = rows[:-1]
    assert full["kept"] == 1 and small["kept"] < 0.45 and small["cache_gib"] < full["cache_gib"] and full["graph"]
    memory = rows[-1]["memory_gib"]
    assert memory["before"] == 0 < memory["weights"]
    said = check.table(report.results)
    assert "semanticache 20 %" in said and "ZeroDivisionError" in said and "10000 needed" in said
