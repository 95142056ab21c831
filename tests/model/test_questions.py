"""General questions about a text, as a model's chat template has them after one."""

import pytest
import tiny_chat

from minillm import LLM, CacheConfig
from minillm.errors import MinillmError
from minillm.questions import ASKED, talk

TURNS = [
    {"role": role, "content": said} for pair in ASKED for role, said in zip(("user", "assistant"), pair, strict=True)
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    with LLM.load(tiny_chat.make(tmp_path_factory.mktemp("model") / "model"), cache=CacheConfig("hindsight")) as llm:
        yield llm


def test_questions_and_answers_are_turns_of_a_chat_about_the_text(llm):
    first = TURNS[0] | {"content": f"a text\n\n{TURNS[0]['content']}"}
    whole, begin = llm.encode([first, *TURNS[1:]]), llm.encode("<|im_start|>user\na text")
    assert llm.compressor.asked == llm.asked == whole[len(begin) : -len(llm.encode("<|im_start|>assistant\n"))]
    assert whole[: len(begin)] == begin


@pytest.mark.parametrize("template", ["no template", "a template that loses the text", "a template that refuses"])
def test_without_a_template_they_stand_on_lines_of_their_own(template):
    class Tokenizer:
        has_chat_template = template != "no template"

        @staticmethod
        def render_chat(messages, **_):
            if template == "a template that refuses":
                raise MinillmError("roles must alternate otherwise")
            return "lost"

    text = talk(Tokenizer)
    assert text.startswith(f"\n\n{ASKED[0][0]}\n\n{ASKED[0][1]}\n\n{ASKED[1][0]}") and text.endswith(ASKED[-1][1])


@pytest.mark.parametrize(("method", "asks"), [("hindsight", True), ("foresight", True), ("kvzip", False)])
def test_methods_that_ask(llm, method, asks):
    config = CacheConfig(method)
    assert bool(config.options.get("asked")) == asks
    if method != "foresight":  # for which this model has no profile
        assert bool(llm.compressor_for(config).asked) == asks
    assert not asks or not llm.compressor_for(CacheConfig("hindsight", asked=False)).asked
