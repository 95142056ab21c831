"""docs/way-of-a-prompt.md names the files that a prompt passes: those of which a function is called in a real run."""

import os
import re
import subprocess
import sys

import pytest
from conftest import NO_COMPILER
from paths import ROOT

from minillm.ops import cpu_lib

PAGE = ROOT / "docs" / "way-of-a-prompt.md"
TRACE = """
import inspect, sys, threading

seen = set()

def watch(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_flags & inspect.CO_OPTIMIZED:  # not the bodies of modules and classes
        seen.add(code.co_filename)

threading.setprofile(watch)
sys.setprofile(watch)
from minillm.programs.run import main

status = main(sys.argv[1:])
sys.setprofile(None)
print(*sorted(seen), sep="\\n")
sys.exit(status)
"""


@pytest.mark.skipif(not cpu_lib.available_paths(), reason=NO_COMPILER)
def test_the_page_names_the_files_that_a_prompt_passes(default_model_path, tmp_path):
    """The default model, its default method and the compiled kernels; a prompt that is long enough to be compressed."""
    (tmp_path / "text.txt").write_text("The cache is small, and nothing is lost. " * 30, encoding="utf-8")
    arguments = ["-m", default_model_path, "-f", tmp_path / "text.txt", "-p", "What is small?", "-n", "4"]
    path = cpu_lib.available_paths()[0]
    environment = os.environ | {"MINILLM_CPU": path}
    command = [sys.executable, "-c", TRACE, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    package = str(ROOT / "minillm") + "/"
    passed = {line.removeprefix(package) for line in done.stdout.splitlines() if line.startswith(package)}
    named = re.findall(r"^\d+\. \[`([\w/]+\.py)`\]\(\.\./minillm/\1\)", PAGE.read_text(encoding="utf-8"), re.M)
    assert len(named) == len(set(named)), "a file is named twice"
    assert set(named) == passed


def test_every_file_of_the_page_has_one_sentence():
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if re.match(r"\d+\. ", line):
            sentence = line.split(")", 1)[1].strip()
            assert sentence.endswith(".") and len(sentence.split()) >= 4, line
