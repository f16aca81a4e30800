"""The chat page, in a headless browser: streaming, stopping, keys, errors, and the keyboard."""

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from tests import serving

# The first opens no connections of its own accord; the browser's sandbox does not work for root.
FLAGS = "disable-background-networking disable-component-update disable-sync no-first-run"
FLAGS += " headless no-sandbox disable-gpu disable-quic window-size=900,700"
THOUGHT, ANSWER = "It is <i>markup</i>.", "Not <b>bold</b>\n  but *plain* text."
FILES = ("", "?chat.css", "?chat.js")


@dataclasses.dataclass
class Stats(serving.Stats):
    drafted_tokens: int = 8
    accepted_tokens: int = 6


@pytest.fixture(scope="module")
def server() -> Iterator[serving.Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving.ScriptedEngine, "stats", lambda _: Stats(0, 0))
        with serving.serve(lambda _: "") as running:
            yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    assert all(programs), "Chromium is missing: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0] or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS.split(), f"user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page as its reader sees it."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser = browser
        browser.get(url)
        self.until(lambda: self.focus() == "prompt")

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait for a condition, for at most ten seconds."""
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end, self.one("body").text
            time.sleep(0.02)

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return [e.text for e in self.browser.find_elements(By.CSS_SELECTOR, selector)]

    def focus(self) -> str:
        return self.browser.execute_script("return document.activeElement.id")

    def press(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        ActionChains(self.browser).send_keys(*keys).perform()

    def ask(self, text: str) -> None:
        """Send a message, and wait until its answer has ended."""
        ended = len(self.texts("article[aria-busy=false]"))
        self.press(text, Keys.ENTER)
        self.until(lambda: len(self.texts("article[aria-busy=false]")) > ended)
        self.until(lambda: self.one("#send").is_displayed())


@pytest.fixture
def page(browser: webdriver.Chrome, server: serving.Running) -> Iterator[Page]:
    server.engine.reset()
    server.engine.script = lambda _: f"{THOUGHT}</think>{ANSWER}"
    server.service.keys = ()
    page = Page(browser, server.url)
    page.until(lambda: page.texts("#model option") == ["tiny"])
    browser.get_log("browser")
    yield page
    server.service.keys = ()


def test_an_answer_is_plain_text_with_its_thinking_folded_and_its_costs(
    page: Page, server: serving.Running
) -> None:
    page.ask("word " * 128)
    assert page.texts(".content") == [ANSWER]
    assert page.texts(".thinking div") == [""]
    page.press(Keys.SHIFT, Keys.TAB)
    page.one("summary").send_keys(Keys.ENTER)
    assert page.texts(".thinking div") == [THOUGHT]
    assert page.one("summary").text.startswith("Thought for ")
    page.one("#prompt").click()
    page.ask("Go on")
    first, second = page.texts(".facts")
    assert "cache hit: 0 of " in first
    assert "cache hit: 128 of " in second
    for facts in (first, second):
        assert "tokens/s" in facts
        assert "drafts accepted by this server: 75%" in facts
    prompt = serving.tokenizer().decode(server.engine.requests[-1].tokens)
    assert ANSWER in prompt
    assert THOUGHT not in prompt
    assert page.browser.get_log("browser") == []


def test_text_appears_while_it_is_generated_and_escape_stops_it(
    page: Page, server: serving.Running
) -> None:
    server.engine.script, server.engine.delay = (lambda _: "</think>" + "word " * 1000), 0.01
    page.press("Why?", Keys.ENTER)
    page.until(lambda: page.texts(".content")[0].count("word") > 3)
    assert page.one("article.assistant").get_attribute("aria-busy") == "true"
    page.press("next", Keys.ENTER)
    page.press(Keys.ESCAPE)
    page.until(lambda: server.engine.finished == ["abort"])
    page.until(lambda: page.texts(".facts") == ["stopped"])
    assert page.one("#prompt").get_attribute("value") == "next"
    assert len(server.engine.requests) == 1
    begun = page.texts(".content")[0].strip()
    server.engine.script, server.engine.delay = (lambda _: "</think>Done."), 0.0
    page.ask("?")
    assert page.texts(".content")[1] == "Done."
    assert f"{begun}" in serving.tokenizer().decode(server.engine.requests[-1].tokens)


def test_the_keyboard_alone_suffices(page: Page, server: serving.Running) -> None:
    visited = []
    for _ in range(8):
        page.press(Keys.TAB)
        visited.append(page.focus())
    assert {"model", "effort", "temperature", "new", "conversation", "send"} <= {*visited}
    assert page.browser.execute_script(
        "return getComputedStyle(document.activeElement).outlineStyle"
    ) in ("solid", "auto")
    page.one("#effort").send_keys("no")
    page.one("#temperature").send_keys(Keys.CONTROL, "a", Keys.NULL, "0")
    page.one("#prompt").send_keys("two", Keys.SHIFT, Keys.ENTER, Keys.NULL, "lines", Keys.ENTER)
    page.until(lambda: page.texts(".facts"))
    assert page.texts(".user p") == ["two\nlines"]
    [request] = server.engine.requests
    assert request.sampling.temperature == 0
    assert serving.tokenizer().decode(request.tokens).endswith("lines<｜Assistant｜></think>")
    page.one("#new").send_keys(Keys.ENTER)
    assert page.texts("article") == []
    assert page.focus() == "prompt"
    page.ask("Anew")
    assert "lines" not in serving.tokenizer().decode(server.engine.requests[-1].tokens)


def test_the_api_key_is_asked_for_and_stays_in_memory(
    browser: webdriver.Chrome, server: serving.Running, page: Page
) -> None:
    server.service.keys = ("the-key",)
    page = Page(browser, server.url)
    page.until(lambda: page.one("#key").is_displayed())
    assert "Authentication Fails" in page.texts(".error")[0]
    page.one("#key").send_keys("the-key", Keys.TAB)
    page.until(lambda: page.texts("#model option") == ["tiny"])
    page.one("#prompt").click()
    page.ask("Hello")
    assert page.texts(".content") == [ANSWER]
    stored = browser.execute_script("return [localStorage.length, document.cookie]")
    assert stored == [0, ""]


def test_errors_are_text_and_give_the_message_back(page: Page, server: serving.Running) -> None:
    server.engine.max_running = 0
    page.ask("First")
    assert page.texts(".error") == ["Too many requests are waiting."]
    assert page.one("#prompt").get_attribute("value") == "First"
    server.engine.max_running, server.engine.fault = 1, "error"
    page.ask("")
    assert "its log says why" in page.texts(".error")[1]
    server.engine.fault = ""
    page.one("#prompt").clear()
    page.ask("Second")
    prompt = serving.tokenizer().decode(server.engine.requests[-1].tokens)
    assert prompt.count("<｜User｜>") == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system(page: Page, scheme: str, tmp_path: Path) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    page.ask("Hello")
    script = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    light, dark = "rgb(255, 255, 255)", "rgb(20, 23, 26)"
    back, text = page.browser.execute_script(script)
    assert back == (light if scheme == "light" else dark)
    assert text != back


def test_the_files_need_no_key_and_ask_for_nothing_from_elsewhere(server: serving.Running) -> None:
    server.service.keys = ("the-key",)
    answers = [httpx.get(f"{server.url}/{name}") for name in FILES]
    server.service.keys = ()
    types = [answer.headers["content-type"].partition(";")[0] for answer in answers]
    assert types == ["text/html", "text/css", "text/javascript"]
    for answer in answers:
        assert answer.status_code == 200
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; ")
        assert "//" not in answer.text.replace("\n// ", "").replace(" // ", "")
        assert "innerHTML" not in answer.text
