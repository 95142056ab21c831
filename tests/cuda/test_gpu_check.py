"""tools/gpu_check.py on the emulated device and a small model: that it runs unattended and reports. What it measures
here is nothing."""

import importlib.util
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import emulator
import pytest
from model_files import CONFIG
from paths import ROOT

from minillm.ops import cuda_device, cuda_ops

if emulator.available():
    pytest.skip(emulator.available(), allow_module_level=True)


@pytest.fixture
def check(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools" / "gpu_check.py")
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
    check.REPEATS = 1
    timing = check.Kernels(device, check.small, ceiling)
    timing.products((1, 2))
    timing.attention(70, 40)
    timing.quantised()
    timing.prompt(8)
    timing.compression(70, 9, 3)
    timing.planning(70, 9)
    timing.sampling(2)
    assert len(timing.rows) == 39 and all(row["us"] > 0 < row["share_of_floor"] for row in timing.rows.values())
    said = check.table({"run": {}, "kernels": timing.rows})
    for kernel in ("segment_topk", "segment_count", "compact", "segment_sum", "pooled", "neighbours"):
        assert f"\n{kernel} 70 " in said
    for kernel in (
        "nearest of a chunk 70",
        "nearest of a head 70",
        "clusters 70 x 3 taus",
        "merge 70",
        "sample greedy x 2",
    ):
        assert f"\n{kernel} " in said


CACHED = "full", "full, 8 bits", "semanticache 20 %", "foresight 20 %", "hindsight 20 %"


def test_a_model_in_every_cache(check, tmp_path):
    report = check.Report(tmp_path / "gpu.json", 1000)
    report.results["run"] = {"card": "emulator"}
    check.CACHES = {name: check.CACHES[name] for name in CACHED}
    report.part("model", 1, check.model, 0, check.small, 1e9, (150,), (1, 2), report, 2)
    report.part("tests", 10_000, check.kernel_tests, 1)
    report.part("peer", 1, lambda: 1 / 0)
    rows = json.loads((tmp_path / "gpu.json").read_text())["model"]
    assert [(row["cache"], row["batch"]) for row in rows[:-1]] == [(name, b) for name in check.CACHES for b in (1, 2)]
    full, short, small, *ours = rows[:-1:2]
    assert all(0.2 < row["kept"] < 0.45 and row["graph"] and 0 < row["compression_share"] < 1 for row in ours)
    assert short["kept"] == 1 and short["cache_share"] == (2 * 64 + 12) / (4 * 64 + 8) and short["graph"]
    assert full["kept"] == 1 and small["kept"] < 0.45 and small["cache_gib"] < full["cache_gib"] and full["graph"]
    assert full["cache_share"] == 1 and small["cache_share"] < 0.7  # half a page of every head is empty, of five
    assert full["compression_share"] == 0 < small["compression_share"] < 1
    memory = rows[-1]["memory_gib"]
    assert memory["before"] == 0 < memory["weights"]
    assert memory["closed"] * check.GIB == 8 * cuda_ops.SLABS  # the table of a device that goes with its ops
    said = check.table(report.results)
    assert "semanticache 20 %" in said and "ZeroDivisionError" in said and "10000 needed" in said
    assert report.failed == ["peer"]


def test_the_whole_of_it_goes_on_where_a_part_fails(check, tmp_path, monkeypatch, capsys):
    """A table comes last, and the file says the same; the exit status says that something failed."""

    def refuse(*_):
        raise ValueError("not here")

    check.CACHES = {"semanticache 20 %": check.CACHES["semanticache 20 %"]}
    check.LLAMA_3_8B, check.CONTEXTS, check.BATCHES = check.small, (140,), (1,)
    check.ceilings = lambda device: {"read_bytes_per_s": 1e9, "bf16_flop_per_s": 1e9}
    check.compiled, check.kernels, check.peer = (lambda device: {}), refuse, lambda *_: {"skipped": "no torch"}
    monkeypatch.setattr(check.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout="abc\n"))
    monkeypatch.setattr(check.shutil, "which", lambda name: None)
    monkeypatch.setattr(check.sys, "argv", ["gpu_check", "--out", str(tmp_path / "gpu.json")])
    assert check.main() == 1
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert list(results) == ["run", "compiled", "ceilings", "kernels", "tests", "model", "peer", "sanitizers"]
    assert results["tests"]["passed"] and results["model"][0]["cache"] == "semanticache 20 %"
    said = capsys.readouterr().out
    for part in ("commit: abc", "not here", "no torch", "no compute-sanitizer", "semanticache 20 %", "reads 1 GB/s"):
        assert part in said


def test_kernels_are_compiled_side_by_side(check, monkeypatch):
    monkeypatch.setattr(check.launch, "files", lambda: ["take", "add_bias", "glu"])
    assert check.compiled(check.open_ops(0).device)["variants"] == 4


@pytest.mark.parametrize(
    "code, seconds, found",
    [
        ("print('fine')", 60, {"passed": True, "said": ["fine"]}),
        ("print('bad'); raise SystemExit(9)", 60, {"passed": False, "said": ["bad"]}),
        ("import time; print('on', flush=True); time.sleep(99)", 2, {"skipped": "more than 2 s", "said": ["on"]}),
    ],
)
def test_tests_that_pass_fail_or_take_too_long(check, monkeypatch, code, seconds, found):
    run = check.subprocess.run
    monkeypatch.setattr(check.subprocess, "run", lambda _, **options: run([sys.executable, "-c", code], **options))
    assert check.pytest_run([], seconds) == found
