"""The chat page, in a headless browser: streaming, stopping, keys, errors, and the keyboard."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests import serving
from tests.browser import CONTROL, ENTER, ESCAPE, SHIFT, TAB, Browser, start
from v4jax.text.chat import USER

THOUGHT, ANSWER = "It is <i>markup</i>.", "Not <b>bold</b>\n  but *plain* text."


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
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with start(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


class Page:
    """The page as its reader sees it."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser, self.press = browser, browser.press
        browser.call("url", url=url)
        self.until(lambda: self.texts("option") and self.texts("#model option, .error"))

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait for a condition, for at most ten seconds."""
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end, self.texts("body")
            time.sleep(0.02)

    def texts(self, selector: str) -> list[str]:
        each = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return self.browser.run(each, selector)

    def get(self, selector: str, name: str) -> Any:
        """A property of an element."""
        script = "return document.querySelector(arguments[0])[arguments[1]]"
        return self.browser.run(script, selector, name)

    def focus(self, selector: str) -> None:
        self.browser.run("document.querySelector(arguments[0]).focus()", selector)

    def ask(self, text: str) -> None:
        """Send a message, and wait until its answer has ended."""
        ended = len(self.texts("[aria-busy=false]"))
        self.press(text + ENTER)
        self.until(lambda: len(self.texts("[aria-busy=false]")) > ended)
        self.until(lambda: self.get("#stop", "hidden"))


@pytest.fixture
def page(browser: Browser, server: serving.Running) -> Iterator[Page]:
    server.engine.reset()
    server.engine.script = lambda _: f"{THOUGHT}</think>{ANSWER}"
    yield Page(browser, server.url)
    server.service.keys = ()


def last_prompt(server: serving.Running) -> str:
    return serving.tokenizer().decode(server.engine.requests[-1].tokens)


def test_an_answer_is_plain_text_with_its_thinking_folded_and_its_costs(
    page: Page, server: serving.Running
) -> None:
    page.ask("word " * 100)
    assert page.texts(".content") == [ANSWER]
    assert page.texts(".thinking div") == [THOUGHT]
    assert page.texts("summary")[0].startswith("Thought for ")
    assert not page.get("details", "open")
    page.focus("summary")
    page.press(ENTER)
    assert page.get("details", "open")
    page.focus("#prompt")
    page.ask("Go on")
    costs = page.texts(".facts")
    assert "cache hit: 0 of " in costs[0]
    assert "cache hit: 128 of " in costs[1]
    for text in costs:
        assert " tokens/s" in text
        assert "drafts accepted by this server: 75%" in text
    assert ANSWER in last_prompt(server)
    assert THOUGHT not in last_prompt(server)
    assert page.browser.console() == []


def test_text_appears_while_it_is_generated_and_escape_stops_it(
    page: Page, server: serving.Running
) -> None:
    server.engine.script, server.engine.delay = (lambda _: "</think>" + "word " * 1000), 0.01
    page.press("Why?" + ENTER)
    page.until(lambda: "".join(page.texts(".content")).count("word") > 3)
    assert page.get(".assistant", "ariaBusy") == "true"
    page.press("next" + ENTER)
    page.press(ESCAPE)
    page.until(lambda: server.engine.finished == ["abort"])
    page.until(lambda: page.texts(".facts") == ["stopped"])
    assert page.get("#prompt", "value") == "next"
    assert len(server.engine.requests) == 1
    server.engine.script, server.engine.delay = (lambda _: "</think>Done."), 0.0
    page.ask("?")
    part, second = page.texts(".content")
    assert second == "Done."
    assert part in last_prompt(server)


def test_the_keyboard_alone_suffices(page: Page, server: serving.Running) -> None:
    focused = "const e = document.activeElement; return [e.id, getComputedStyle(e).outlineStyle]"
    outlines: dict[str, str] = {}
    for _ in range(8):
        page.press(TAB)
        name, outlines[name] = page.browser.run(focused)
    controls = ("model", "effort", "temperature", "new", "conversation", "prompt", "send")
    assert [outlines[name] for name in controls] == ["solid"] * len(controls)
    page.focus("#effort")
    page.press("no")
    page.focus("#temperature")
    page.press("a", hold=CONTROL)
    page.press("0")
    page.focus("#prompt")
    page.press("two")
    page.press(ENTER, hold=SHIFT)
    page.ask("lines")
    assert page.texts(".user p") == ["two\nlines"]
    assert server.engine.requests[0].sampling.temperature == 0
    assert last_prompt(server).endswith("</think>")
    page.focus("#new")
    page.press(ENTER)
    assert page.texts("article") == []
    page.ask("Anew")
    assert "lines" not in last_prompt(server)


def test_the_api_key_is_asked_for_and_stays_in_memory(page: Page, server: serving.Running) -> None:
    assert page.get("#key-label", "hidden")
    server.service.keys = ("the-key",)
    page = Page(page.browser, server.url)
    assert "Authentication Fails" in page.texts(".error")[0]
    assert not page.get("#key-label", "hidden")
    page.focus("#key")
    page.press("the-key" + TAB)
    page.until(lambda: page.texts("#model option") == ["tiny"])
    page.focus("#prompt")
    page.ask("Hello")
    assert page.texts(".content") == [ANSWER]
    assert page.browser.run("return [localStorage.length, document.cookie]") == [0, ""]
    page.browser.console()


def test_errors_are_text_and_give_the_message_back(page: Page, server: serving.Running) -> None:
    server.engine.max_running = 0
    page.ask("First")
    assert page.texts(".error") == ["Too many requests are waiting."]
    assert page.get("#prompt", "value") == "First"
    server.engine.max_running, server.engine.fault = 1, "error"
    page.ask(" try")
    assert "its log says why" in page.texts(".error")[1]
    server.engine.fault = ""
    page.focus("#new")
    page.press(ENTER)
    page.ask("Second")
    assert page.texts(".error") == []
    assert last_prompt(server).count(USER) == 1
    page.browser.console()


@pytest.mark.parametrize(("scheme", "colour"), [("light", 255), ("dark", 20)])
def test_colours_follow_the_system(page: Page, scheme: str, colour: int) -> None:
    page.browser.prefer(scheme)
    back = page.browser.run("return getComputedStyle(document.body).backgroundColor")
    assert back.startswith(f"rgb({colour}, ")


def test_the_files_need_no_key_and_ask_for_nothing_from_elsewhere(server: serving.Running) -> None:
    server.service.keys = ("the-key",)
    answers = [httpx.get(server.url + path) for path in ("/", "/?chat.css", "/?chat.js")]
    server.service.keys = ()
    types = [answer.headers["content-type"].partition(";")[0] for answer in answers]
    assert types == ["text/html", "text/css", "text/javascript"]
    for answer in answers:
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
        assert "http:" not in answer.text
        assert "https:" not in answer.text
        assert "HTML" not in answer.text.removeprefix("<!doctype html>")
