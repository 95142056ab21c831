"""tools/compare_cpu.py: the files it makes, and the table it makes of measurements. The measurements themselves are
processes with engines that are not here."""

import argparse
import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from model_files import CONFIG, MODEL, stored, write_gguf
from paths import ROOT

from minillm.files.weights import load_weights

TOOL = ROOT / "tools" / "compare_cpu.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compare_cpu", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "BF16"])
def test_files_hold_the_same_weights(tool, tmp_path, kind):
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    write_gguf(source, MODEL, CONFIG, "Q4_1")
    tool.write_gguf(source, target, kind)
    made = load_weights(stored(target, CONFIG), dtype="stored")
    number, q4_1 = (gguf.GGMLQuantizationType[name] for name in (kind, "Q4_1"))
    for name, before in load_weights(stored(source, CONFIG), dtype="float32").items():
        after = made[name]
        if len(before.shape) == 1:
            np.testing.assert_array_equal(after.data, before.data)
            continue
        kept = name == "model.embed_tokens.weight" and kind != "BF16"
        assert after.format.name == ("Q4_1" if kept else kind)
        expected = dequantize(quantize(before.data, number), number) if not kept else before.data
        np.testing.assert_array_equal(after.rows(0, after.shape[0]), expected)


def test_ratios_are_taken_from_what_was_measured(tool):
    def contestant(engine, kind, setting):
        return tool.Contestant(engine, kind, setting, Path(), "")

    found = [
        contestant("minillm", "Q4_1", "full"),
        contestant("minillm", "Q4_1", 0.2),
        contestant("llama.cpp", "Q4_1", False),
        contestant("llama.cpp", "Q4_0", True),
        contestant("transformers", "bfloat16", "bfloat16"),
    ]

    def rounds(prompt, step, start, peak, token=7):
        one = {"prompts": [prompt, prompt], "steps": [step, 9.0, step], "start": start, "peak": peak << 20}
        one |= {"about": "x", "token": token}
        return [one, one | {"peak": one["peak"] // 2}]

    figures = {
        (0, 100): rounds(0.5, 0.02, 1.0, 200),  # 200 tok/s, 50 tok/s
        (1, 100): rounds(1.0, 0.01, 1.5, 100),  # 100, 100
        (2, 100): rounds(2.0, 0.05, 2.0, 400),  # 50, 20
        (3, 100): rounds(4.0, 0.025, 4.0, 250),  # 25, 40
    }
    args = argparse.Namespace(lengths=[100], threads=2, rounds=2)
    text = tool.tables(args, found, figures, ["transformers failed."], 0.1, (2e9, 3e9))
    lines = text.splitlines()
    assert "| minillm | Q4_1 | 20% | 100 | 100.0 | 1.50 | 100 |" in lines
    assert "| llama.cpp | Q4_0 | full, flash attention | 25 | 40.0 | 4.00 | 250 |" in lines
    assert "| transformers | bfloat16 | full | - | - | - | - |" in lines
    assert "| minillm Q4_1, full | llama.cpp, same file | 4.00 | 2.50 | 0.50 | 0.50 |" in lines
    assert "| minillm Q4_1, full | llama.cpp at its best | 4.00 | 1.25 | 0.50 | 0.80 |" in lines
    assert "| minillm Q4_1, 20% | llama.cpp at its best | 2.00 | 2.50 | 0.75 | 0.40 |" in lines
    assert "All engines choose the same token after the prompt." in lines
    figures[3, 100] = rounds(4.0, 0.025, 4.0, 250, token=8)
    assert "100: 7 (minillm Q4_1, llama.cpp Q4_1), 8 (llama.cpp Q4_0)." in tool.agreement(args, found, figures)
    assert lines[-1] == "transformers failed." and "2.0 GB/s before and 3.0 after" in lines[0]


def test_a_failed_process_tells_its_last_words(tool, tmp_path):
    args = argparse.Namespace(threads=1)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho first; echo 'no such engine' >&2; exit 3\n")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match="status 3 no such engine"):
        tool.run(tool.Contestant("llama.cpp", "Q4_1", False, Path(), str(python)), [1] * 100, args)


def test_the_table_goes_between_its_marks(tool, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tool.BEGIN}\nold\n{tool.END}\nafter\n")
    assert tool.around_marks(page) == (f"before\n{tool.BEGIN}", f"{tool.END}\nafter\n")
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="has no lines"):
        tool.around_marks(page)
    readme = (TOOL.parent.parent / "README.md").read_text(encoding="utf-8")
    assert readme.count(tool.BEGIN) == readme.count(tool.END) == 1
