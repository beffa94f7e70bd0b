"""The page at ``/ui``, in a real browser where there is one."""

from __future__ import annotations

import asyncio
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from asyncengine import AsyncEngine, EngineConfig
from asyncengine.server import create_app
from asyncengine.testing import ByteTokenizer, ScriptedLoader
from tests.server.serving import AUTH, KEY, MODEL, echo_engine, listening, served, settled, until

SHOTS: str | None = None
"""A directory to put screenshots in, for whoever wants to look."""


async def test_the_page_is_self_contained_and_may_do_nothing_else() -> None:
    async with served(api_key=KEY) as client:
        assert (await client.get("/ui")).headers["www-authenticate"].startswith("Basic")
        page = await client.get("/ui", headers=AUTH)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert not re.search(r"https?://|innerHTML|eval\(", page.text)
    async with served(ui=False) as client:
        assert (await client.get("/ui")).status_code == 404


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("there is no chromium with its driver")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        webdriver = pytest.importorskip("selenium.webdriver")
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1100,800",
            # One process for all pages, and none in advance.
            "--renderer-process-limit=1", "--disable-features=SpareRendererForSitePerProcess,site-per-process",
            "--disable-site-isolation-trials", "--disable-extensions",
        ):  # fmt: skip
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(executable_path=driver)
        found = webdriver.Chrome(options=options, service=service)
    yield found
    found.quit()


class Page:
    """What a user sees and does."""

    def __init__(self, browser: Any, url: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.keys = Keys
        self.browser = browser
        self.url = url
        browser.get(f"{url}/ui")

    def at(self, name: str) -> Any:
        return self.browser.find_element("id", name)

    def text(self, selector: str) -> str:
        return str(
            self.browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)
        )

    def until(self, what: Callable[[], Any]) -> Any:
        until = time.monotonic() + 15
        while not (found := what()):
            assert time.monotonic() < until, self.text("body")
            time.sleep(0.05)  # each look keeps the browser busy
        return found

    def answers(self) -> list[Any]:
        return list(self.browser.find_elements("css selector", "#log > .assistant"))

    def answered(self, count: int = 1) -> str:
        """The newest answer, once it is complete."""
        done = "#log > .assistant[aria-busy=false]"
        self.until(lambda: len(self.browser.find_elements("css selector", done)) == count)
        return str(self.answers()[-1].text)

    def type(self, *keys: str) -> None:
        """On the keyboard, to whatever has the focus."""
        self.browser.switch_to.active_element.send_keys(*keys)

    def paste(self, text: str) -> None:
        """Into whatever has the focus, at once: typed letter by letter, a long text takes its time."""
        self.browser.execute_script("document.execCommand('insertText', false, arguments[0])", text)

    def focus(self) -> str:
        """What has the focus, by its id."""
        return str(self.browser.switch_to.active_element.get_attribute("id"))

    def open_settings(self, opened: bool) -> None:
        self.browser.execute_script("document.querySelector('#settings').open = arguments[0]", opened)

    def shoot(self, name: str) -> None:
        if SHOTS is not None:
            self.browser.save_screenshot(f"{SHOTS}/{name}.png")


def as_admin(page: Page) -> Page:
    """The page as a browser opens it that was given a name and the key as password."""
    return Page(page.browser, page.url.replace("//", f"//me:{KEY}@"))


def drive(
    browser: Any, engine: AsyncEngine, script: Callable[[Page], None], *, below: str = "", **settings: Any
) -> None:
    """Serves an engine, perhaps below a path, and lets `script` use the page, on a thread of its own."""

    async def main() -> None:
        app = create_app(engine, **settings)
        async with engine, listening(Starlette(routes=[Mount(below, app)]) if below else app) as url:
            await asyncio.to_thread(lambda: script(Page(browser, url)))
            await asyncio.to_thread(browser.get, "about:blank")

    asyncio.run(main())
    complaints = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [message for message in complaints if "the server responded with a status of" not in message]


def test_a_chat_by_keyboard_alone(browser: Any) -> None:
    def script(page: Page) -> None:
        page.type("What is 2 + 2?", page.keys.ENTER)
        first = page.answered()
        assert first.startswith("user: What is 2 + 2?") and "tokens, first after" in first
        page.type("And 3 + 3?", page.keys.SHIFT, page.keys.ENTER, page.keys.NULL, "Well?", page.keys.ENTER)
        second = page.answered(2)
        assert "user: What is 2 + 2?\nassistant: user:" in second and "user: And 3 + 3?\nWell?" in second
        page.until(lambda: page.text("#state") == "ready" and page.text("#model") == MODEL)
        page.shoot("chat")

    drive(browser, echo_engine(), script)


def test_an_answer_comes_bit_by_bit_and_stops_when_it_is_told_to(browser: Any) -> None:
    engine = echo_engine(step_seconds=0.02)

    def script(page: Page) -> None:
        for stop in ("escape", "button"):
            ended = engine.metrics().counters.requests["abort"]
            page.at("clear").click()
            page.at("text").click()
            page.paste("x" * 500)
            page.type(page.keys.ENTER)
            length = page.until(lambda: len(page.text(".assistant")))
            page.until(lambda length=length: len(page.text(".assistant")) > length)
            if stop == "escape":
                page.type(page.keys.ESCAPE)
            else:
                page.at("stop").click()
            assert page.answered().endswith("stopped")
            page.until(lambda ended=ended: engine.metrics().counters.requests["abort"] > ended)
            assert page.at("send").is_displayed() and not page.at("stop").is_displayed()

    drive(browser, engine, script)


def test_a_model_is_loaded_while_one_chats(browser: Any) -> None:
    loader = ScriptedLoader(tokenizer=ByteTokenizer(), step_seconds=0.01)

    def script(page: Page) -> None:
        page.at("settings").find_element("tag name", "summary").click()
        page.at("key").send_keys(KEY, page.keys.TAB)
        page.until(lambda: page.text("#state") == "ready")
        page.at("text").click()
        page.paste("y" * 60)
        page.type(page.keys.ENTER)
        page.until(lambda: len(page.text(".assistant")) > 3)
        page.at("other").send_keys("another")
        page.at("reload").click()
        assert page.answered().startswith("user: " + "y" * 60)
        page.until(lambda: page.text("#loading").startswith("loaded in"))
        page.until(lambda: page.text("#model") == "another")
        page.at("text").send_keys("still there?", page.keys.ENTER)
        assert "user: still there?" in page.answered(2)

    engine = AsyncEngine(EngineConfig(MODEL), loader=loader)
    # The page itself is opened as a browser opens it: with a name and the key as password.
    drive(
        browser,
        engine,
        lambda page: script(Page(browser, page.url.replace("//", f"//me:{KEY}@"))),
        api_key=KEY,
        admin=True,
    )


def test_what_goes_wrong_is_said(browser: Any) -> None:
    def script(page: Page) -> None:
        page.at("settings").find_element("tag name", "summary").click()
        page.at("temperature").send_keys("-1")
        page.browser.execute_script("document.querySelector('#ask').noValidate = true")
        page.at("text").send_keys("hello", page.keys.ENTER)
        assert "temperature is -1" in page.answered()
        assert page.at("text").get_property("value") == "hello"  # to be sent again
        page.at("other").send_keys("another", page.keys.ENTER)
        page.until(lambda: "without its admin routes" in page.text("#loading"))
        assert len(page.answers()) == 1

    drive(browser, echo_engine(), script)


def test_a_wrong_parameter_that_is_folded_away_is_shown(browser: Any) -> None:
    wrong = {"temperature": "-1", "top_p": "2", "max_tokens": "1.5", "seed": "12345678901234567890"}
    right = {"temperature": "0.75", "top_p": "0.955", "max_tokens": "30", "seed": "-7"}

    def script(page: Page) -> None:
        page.at("text").send_keys("hello")
        for name in wrong:
            page.open_settings(True)
            page.at(name).send_keys(wrong[name])
            page.open_settings(False)
            page.at("text").send_keys(page.keys.ENTER)
            page.until(lambda name=name: page.focus() == name and page.at(name).is_displayed())
            page.at(name).clear()
            page.at(name).send_keys(right[name])
        assert not page.answers()
        page.at("text").send_keys(page.keys.ENTER)
        assert "user: hello" in page.answered()

    drive(browser, echo_engine(), script)


def test_the_focus_stays_with_who_presses_the_buttons_by_keyboard(browser: Any) -> None:
    def script(page: Page) -> None:
        page.paste("x" * 100)
        page.type(page.keys.TAB)
        assert page.focus() == "send"
        page.type(page.keys.ENTER)
        page.until(lambda: page.focus() == "stop")
        page.type(page.keys.ENTER)
        assert page.focus() == "text"
        page.answered()

    drive(browser, echo_engine(step_seconds=0.02), script)


def test_a_new_conversation_knows_nothing_of_an_answer_that_was_under_way(browser: Any) -> None:
    def script(page: Page) -> None:
        page.paste("x" * 100)
        page.type(page.keys.ENTER)
        page.until(lambda: page.text(".assistant > span"))
        page.at("clear").click()
        page.until(lambda: page.at("send").is_displayed())
        assert page.text("#log") == "Say something to the model."
        page.type("hello", page.keys.ENTER)
        page.until(lambda: page.text(".assistant > span").startswith("user: hello"))

    drive(browser, echo_engine(step_seconds=0.02), script)


def test_markup_is_text(browser: Any) -> None:
    markup = "<img src=x onerror=document.title=1><b>bold</b> **bold** <script>document.title=2</script>"

    def script(page: Page) -> None:
        page.type(markup, page.keys.ENTER)
        assert page.answered().startswith(f"user: {markup}")
        assert not page.browser.find_elements("css selector", "#log img, #log b, #log script")
        assert page.browser.title == "asyncengine"

    drive(browser, echo_engine(), script)


def test_overload_and_a_server_that_goes_away_are_said(browser: Any) -> None:
    engine = echo_engine(step_seconds=0.02, max_num_sequence=1, max_queue_size=1)
    lost = "The connection to the server was lost."

    async def main() -> None:
        async with engine:
            async with listening(create_app(engine), timeout_graceful_shutdown=0) as url:
                page = await asyncio.to_thread(Page, browser, url)
                streams = []
                for waiting in (0, 1):
                    streams.append(await engine.add_request("z" * 1000))
                    await until(lambda waiting=waiting: engine.metrics().num_requests_waiting == waiting)
                await asyncio.to_thread(page.type, "hello", page.keys.ENTER)
                assert await asyncio.to_thread(page.answered) == "1 requests wait; max_queue_size is 1"
                for stream in streams:
                    await stream.aclose()
                await settled(engine)
                await asyncio.to_thread(page.paste, "!" * 200)
                await asyncio.to_thread(page.type, page.keys.ENTER)
                await asyncio.to_thread(page.until, lambda: page.text("#log > .assistant:last-child > span"))
            said = await asyncio.to_thread(page.answered, 2)
            assert said.startswith("user: ") and said.endswith(lost)
            await asyncio.to_thread(page.until, lambda: page.text("#state") == "no connection")
            await asyncio.to_thread(page.type, "again", page.keys.ENTER)
            assert await asyncio.to_thread(page.answered, 3) == lost
            await asyncio.to_thread(browser.get, "about:blank")
            browser.get_log("browser")

    asyncio.run(main())


def test_it_works_below_another_application(browser: Any) -> None:
    def script(page: Page) -> None:
        page.type("hello", page.keys.ENTER)
        assert "user: hello" in page.answered()
        page.until(lambda: page.text("#state") == "ready")
        page.at("tab-trace").click()
        page.at("record").click()
        page.until(lambda: "without its admin routes" in page.text("#traced"))

    drive(browser, echo_engine(), lambda page: script(Page(page.browser, f"{page.url}/llm")), below="/llm")


def test_a_wrong_key_is_said(browser: Any) -> None:
    def script(page: Page) -> None:
        page.open_settings(True)
        page.at("key").send_keys("guessed", page.keys.TAB)
        page.until(lambda: "the API key is missing or wrong" in page.text("#state"))
        page.at("text").send_keys("hello", page.keys.ENTER)
        assert page.answered() == "the API key is missing or wrong"
        page.at("key").clear()
        page.at("key").send_keys(KEY, page.keys.TAB)
        page.until(lambda: page.text("#state") == "ready")
        page.browser.execute_script("sessionStorage.clear()")

    drive(browser, echo_engine(), lambda page: script(as_admin(page)), api_key=KEY)


CONTRAST = """
const pen = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function paint(...colours) {
  for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
  return pen.getImageData(0, 0, 1, 1).data;
}
function luminance(rgb) {
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const [r, g, b] = [...rgb].slice(0, 3).map(v => linear(v / 255));
  return .2126 * r + .7152 * g + .0722 * b;
}
function behind(element) {
  const found = [];
  for (let e = element; e; e = e.parentElement) found.unshift(getComputedStyle(e).backgroundColor);
  return found;
}
const poor = [];
function check(element, colour, least, what) {
  const under = behind(element), both = [paint(...under, colour), paint(...under)].map(luminance);
  const [a, b] = both.sort((x, y) => y - x);
  const found = (a + .05) / (b + .05);
  if (found < least) poor.push(`${element.tagName} ${element.id} ${element.className} ${what}: ${found.toFixed(2)}`);
}
for (const element of document.querySelectorAll("body *")) {
  if (!element.checkVisibility() || element.disabled) continue;
  const style = getComputedStyle(element);
  if ([...element.childNodes].some(n => n.nodeType === 3 && n.data.trim())) check(element, style.color, 4.5, "text");
  if (element.matches("input, textarea")) {
    check(element, getComputedStyle(element, "::placeholder").color, 4.5, "placeholder");
    check(element.parentElement, style.borderTopColor, 3, "border");
  }
}
return poor;
"""


def test_everything_can_be_read_and_has_a_name(browser: Any) -> None:
    """The contrast is that of WCAG 2.2, AA: 4.5 for text, 3 for what shows where a field is."""

    def script(page: Page) -> None:
        page.type("hello", page.keys.ENTER)
        page.answered()
        page.open_settings(True)
        page.at("top_p").send_keys("0")
        page.at("text").send_keys("hello", page.keys.ENTER)
        assert "top_p" in page.answered(2)
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            assert page.browser.execute_script(f"return matchMedia('(prefers-color-scheme: {scheme})').matches")
            for tab in ("chat", "metrics", "trace"):
                page.at(f"tab-{tab}").click()
                if tab == "metrics":
                    page.until(lambda: page.text("#cards"))
                assert not page.browser.execute_script(CONTRAST), scheme
        unnamed = "return [...document.querySelectorAll('input, textarea, button, canvas, [role=article]')]"
        unnamed += ".filter(e => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map(e => e.outerHTML)"
        assert not page.browser.execute_script(unnamed)

    try:
        drive(browser, echo_engine(), script)
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_metrics_and_the_timeline_are_shown(browser: Any) -> None:
    engine = echo_engine(step_seconds=0.002)

    def script(page: Page) -> None:
        page.at("tab-trace").click()
        page.at("record").click()
        page.until(lambda: page.text("#record") == "Stop recording")
        page.at("tab-chat").click()
        page.at("text").send_keys("hello", page.keys.ENTER)
        page.answered()
        page.at("tab-chat").send_keys(page.keys.ARROW_RIGHT)
        page.until(lambda: "tokens generated" in page.text("#cards"))
        generated = str(engine.metrics().counters.generation_tokens)
        page.until(lambda: f"{generated}\ntokens generated" in page.text("#cards"))
        page.shoot("metrics")
        page.type(page.keys.ARROW_RIGHT)
        page.at("record").click()
        page.at("show").click()
        page.until(lambda: "ms in view" in page.text("#span"))
        wide = page.text("#span")
        page.at("timeline").send_keys("+")
        page.until(lambda: page.text("#span") != wide)
        closer = page.text("#span")
        page.at("wider").click()  # who has no keyboard
        page.until(lambda: page.text("#span") != closer)
        assert page.at("legend").is_displayed()
        drawn = "const c = document.querySelector('#timeline');"
        drawn += "return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v > 0)"
        assert page.browser.execute_script(drawn)
        page.shoot("trace")

    drive(browser, engine, lambda page: script(as_admin(page)), api_key=KEY, admin=True)


def test_it_fits_a_phone(browser: Any) -> None:
    def script(page: Page) -> None:
        page.paste("w" * 200)
        page.type(page.keys.ENTER)
        page.answered()
        for width, height in ((360, 740), (320, 568), (740, 360)):
            phone = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
            page.until(
                lambda size=[width, height]: page.browser.execute_script("return [innerWidth, innerHeight]") == size
            )
            check(page, f"{width}x{height}")

    def check(page: Page, phone: str) -> None:
        for tab in ("chat", "metrics", "trace"):
            page.at(f"tab-{tab}").click()
            wide = page.browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
            assert wide[0] <= wide[1], (phone, tab)
            panels = page.browser.find_elements("css selector", "[role=tabpanel]")
            assert [panel.get_attribute("id") for panel in panels if panel.is_displayed()] == [tab]
        page.at("tab-chat").click()
        for opened in (False, True):
            page.open_settings(opened)
            send = page.at("send").rect
            assert send["y"] + send["height"] <= page.browser.execute_script("return innerHeight"), phone
            page.shoot(f"phone-{phone}-{opened}")

    try:
        drive(browser, echo_engine(), script)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
