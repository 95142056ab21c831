"""docs/way-of-a-prompt.md names the files that a prompt passes: those of which a function is called in a real run."""

import os
import re
import subprocess
import sys

import pytest
from conftest import NO_COMPILER
from paths import ROOT

from minillm.ops import cpu_lib

PAGE = (ROOT / "docs" / "way-of-a-prompt.md").read_text(encoding="utf-8")
MOST = 30  # files from text to text
TRACE = """
import inspect, sys

def watch(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_flags & inspect.CO_OPTIMIZED:  # not the bodies of modules and classes
        seen.add(code.co_filename)

def traced(work):
    global seen
    seen = set()
    sys.setprofile(watch)
    found = work()
    sys.setprofile(None)
    print(*seen, sep="\\n")
    print("--")
    return found

from minillm import LLM, CacheConfig, SamplingParams
from minillm.programs.run import main

prompt = [{"role": "user", "content": "The cache is small, and nothing is lost. " * 30}]
llm = traced(lambda: LLM.load(cache=CacheConfig(budget=0.3)))
traced(lambda: list(llm.stream(prompt, SamplingParams(max_tokens=4))))
traced(lambda: main(["-n", "4", "-p", "hello", "--json"]))
"""


@pytest.fixture(scope="module")
def passed(default_model_path):
    """The files of which a function is called while the model is loaded, while a prompt is answered, and by the command
    line around both."""
    if not cpu_lib.available_paths():
        pytest.skip(NO_COMPILER)
    environment = os.environ | {"MINILLM_CPU": cpu_lib.available_paths()[0]}
    done = subprocess.run(
        [sys.executable, "-c", TRACE], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    package = str(ROOT / "minillm") + os.sep
    parts = [part.splitlines() for part in done.stdout.split("--\n")[:3]]
    return [{line.removeprefix(package) for line in part if line.startswith(package)} for part in parts]


def named(section):
    """The files that a section of the page names, and their sentences."""
    text = PAGE.split(f"## {section}")[1].split("\n## ")[0]
    return dict(re.findall(r"^\d+\. \[`([\w/]+\.py)`\]\(\.\./minillm/\1\) (.+)$", text, re.M))


def test_from_text_to_text(passed):
    files = named("From text to text")
    assert set(files) == passed[1] and len(files) <= MOST


def test_loading(passed):
    assert set(named("Before it")) == passed[0] - passed[1]


def test_the_command_line(passed):
    assert set(named("Around it")) == passed[2] - passed[1] - passed[0]


def test_every_file_has_its_number_and_a_sentence():
    files = [named(section) for section in ("From text to text", "Before it", "Around it")]
    numbers = list(map(int, re.findall(r"^(\d+)\. ", PAGE, re.M)))
    assert numbers == list(range(1, sum(map(len, files)) + 1))
    for name, sentence in [pair for part in files for pair in part.items()]:
        assert sentence.endswith(".") and len(sentence.split()) >= 4 and (ROOT / "minillm" / name).is_file()
