"""The page in a browser. By hand: pip install playwright, a Chromium (CHROMIUM names it), and

python -m pytest -n 0 -m browser tests/server/test_browser.py
"""

import os
import re
import shutil

import pytest
import tiny_chat
from serving import nothing_is_held, served

from minillm import LLM, CacheConfig, SamplingParams

pytestmark = pytest.mark.browser
SCRIPT = "<script>document.title = 'taken'</script>"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tiny_chat.make(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=8192)
    with LLM.load(folder, cache=CacheConfig("hindsight", 0.2), cache_limit=64 << 20) as llm:
        yield llm


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(llm, browser):
    """A page that says nothing on its console."""
    said = []
    with served(llm, params=SamplingParams(temperature=0, ignore_eos=True)) as (listener, client):
        page = browser.new_page()
        page.on("console", lambda one: one.type in ("error", "warning") and said.append(one.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.server = listener.server
        page.goto(str(client.base_url))
        page.wait_for_selector("#model >> text=tokens")
        yield page
        page.close()
    assert not said
    assert nothing_is_held(llm)


def short(page, tokens=30):
    page.click("#settings summary")
    page.fill("#longest", str(tokens))


def test_ask_and_read(page, llm):
    short(page)
    page.fill("#words", "hello")
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant .foot >> text=tok/s")
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    expected = llm.generate([{"role": "user", "content": "hello"}], params)
    page.click("#temperature")
    page.evaluate("document.getElementById('temperature').value = 0")
    page.dispatch_event("#temperature", "input")
    page.click("text=Again")
    page.wait_for_selector("text=Again")
    assert re.sub(r"\W+", "", page.inner_text(".message.assistant .body")) == re.sub(r"\W+", "", expected)


def test_stop_frees_the_place(page):
    short(page, 7000)
    page.fill("#words", "go on")
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant .body p")
    assert page.server.places.taken == 1
    page.click("#stop")
    page.wait_for_selector(".foot >> text=stopped")
    page.wait_for_selector("#send:visible")
    for _ in range(100):
        if not page.server.places.taken:
            break
        page.wait_for_timeout(20)
    assert page.server.places.taken == 0


def test_a_text_is_seen_and_asked_about(page):
    text = "".join(f"Line {i}: the cat sat on mat {i * 7 % 90}. " for i in range(60))
    page.set_input_files("#file", {"name": "cats.txt", "mimeType": "text/plain", "buffer": text.encode()})
    page.wait_for_selector("#document span")
    assert "Line 59" in page.inner_text("#document") and "cats.txt: " in page.inner_text("#about")
    assert re.search(r"held; a full cache takes .*: \d+", page.inner_text("#bytes"))
    width = page.evaluate("document.getElementById('held').getBoundingClientRect().width")
    assert 0 < width < page.evaluate("document.getElementById('bar').getBoundingClientRect().width") / 2
    ink = "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    assert page.eval_on_selector("#map", ink) > 5
    page.hover("#document span >> nth=40")
    assert re.search(r"held by \d+ of \d+ heads", page.inner_text("#hover"))
    short(page, 5)
    page.fill("#words", "what sat?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant .foot >> text=tok/s")
    cached, all_of_it = re.search(r"(\d+) of (\d+) tokens", page.inner_text(".message.assistant .foot")).groups()
    assert 0.9 * int(all_of_it) < int(cached) < int(all_of_it)


def test_the_same_at_several_budgets(page):
    short(page, 8)
    page.check("#compare")
    page.fill("#words", "which one? " * 40)
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Again")
    assert page.locator(".columns h3").all_inner_texts() == ["5 %", "10 %", "20 %", "100 %"]
    assert all("tok/s" in text for text in page.locator(".columns .foot").all_inner_texts())


def test_a_talk_is_kept_edited_and_deleted(page):
    short(page, 5)
    page.fill("#words", "remember this")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Again")
    answer = page.inner_text(".message.assistant .body")
    page.reload()
    assert page.inner_text(".message.user .body") == "remember this"
    assert page.inner_text(".message.assistant .body") == answer
    page.click("text=Edit")
    assert page.input_value("#words") == "remember this" and page.locator(".message").count() == 0
    page.click("[aria-label^=Delete]")
    page.reload()
    assert page.locator(".message").count() == 0


def test_what_is_said_stays_text(page):
    """In a question, in an answer, in the name of a talk and in a text that was added."""
    page.evaluate(
        "text => markdown(text, document.getElementById('about'))",
        f"{SCRIPT} `{SCRIPT}` **{SCRIPT}**\n\n```\n{SCRIPT}\n```",
    )
    assert page.inner_text("#about").count(SCRIPT) == 4 and page.locator("#about script").count() == 0
    short(page, 3)
    text = {"name": f"{SCRIPT}.txt", "mimeType": "text/plain", "buffer": (SCRIPT * 60).encode()}
    page.set_input_files("#file", text)
    page.wait_for_selector("#document span")
    page.fill("#words", SCRIPT)
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Again")
    assert page.title() == "minillm" and page.inner_text(".message.user .body") == SCRIPT
    assert SCRIPT in page.inner_text("#list") and page.locator("script").count() == 1


MARKDOWN = """# Head
A *line* of **words** and `code`.

- one
- two

3. three

| a | b |
|---|---|
| 1 | 2 |

```py
x < y
```"""


def test_markdown(page):
    shape = """text => {
        const into = document.createElement("div");
        markdown(text, into);
        return into.innerHTML;
    }"""
    assert page.evaluate(shape, MARKDOWN) == (
        "<h3>Head</h3><p>A *line* of <strong>words</strong> and <code>code</code>.</p><ul><li>one</li><li>two</li></ul>"
        '<ol start="3"><li>three</li></ol><table><tbody><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr>'
        "</tbody></table><pre><code>x &lt; y</code></pre>"
    )


def test_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 640})
    wide = lambda: page.evaluate("document.documentElement.scrollWidth")  # noqa: E731
    assert wide() == 360 and not page.is_visible("#talks") and not page.is_visible("#cache")
    for name in ("talks", "cache"):
        page.click(f"#show-{name}")
        assert page.is_visible(f"#{name}") and wide() == 360
    page.click("#show-cache")
    short_words = "a_word_that_is_longer_than_a_phone_is_wide_" * 4
    page.fill("#words", short_words)
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.user")
    assert wide() == 360
    page.click("#stop")
    page.wait_for_selector("#send:visible")


def test_by_keyboard_alone(page):
    """The first stop is a new talk; what is typed there, asked and stopped needs no mouse."""
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "new"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "words"
    page.keyboard.type("hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:visible")
    assert page.inner_text(".message.user .body") == "hello\nthere"
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:visible")
    names = page.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea')].filter(e => !e.labels?.length && "
        "!e.textContent.trim() && !e.getAttribute('aria-label') && !e.placeholder && e.type != 'file').map(e => e.id)"
    )
    assert not names
