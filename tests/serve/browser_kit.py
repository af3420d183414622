"""A browser on the playground's page, and helpers to read and drive the page."""

import contextlib
import json
import re
from typing import Any
from urllib.parse import urlsplit

DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
PATIENCE = 30_000
"""Timeout of a condition, in milliseconds."""
QUESTION = "Where does Mia live?"

# Every text on the page whose colour has less contrast with what is behind it than 4.5, as "text: contrast".
FAINT = """() => {
  const numbers = (colour) => {
    const found = colour.match(/[\\d.e-]+/g).map(Number);
    const unit = colour.startsWith("color(") ? 255 : 1;
    return [found[0] * unit, found[1] * unit, found[2] * unit, found[3] ?? 1];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(numbers(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const faint = [];
  const look = (element, text, colour) => {
    const below = behind(element);
    const [dim, bright] = [light(over(numbers(colour), below)), light(below)].sort((a, b) => a - b);
    const contrast = (bright + 0.05) / (dim + 0.05);
    if (contrast < 4.5) faint.push(`${text}: ${contrast.toFixed(2)}`);
  };
  for (const element of document.body.querySelectorAll("*")) {
    if (!element.checkVisibility()) continue;
    const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
    const style = getComputedStyle(element);
    if (text) look(element, text, element instanceof SVGElement ? style.fill : style.color);
    if (element.placeholder) look(element, element.placeholder, getComputedStyle(element, "::placeholder").color);
  }
  return faint;
}"""
# What sticks out of the page at its sides.
WIDE = """() => [...document.body.querySelectorAll("*")].filter((element) => {
  if (!element.checkVisibility() || element.closest("svg, .sr, .skip, .tree-box")) return false;
  const box = element.getBoundingClientRect();
  return box.left < -0.5 || box.right > innerWidth + 0.5;
}).map((element) => element.outerHTML.slice(0, 80)).concat(
  document.documentElement.scrollWidth > innerWidth ? ["the page scrolls sideways"] : [])"""
# Remembers how long the last reply's text was after each change.
WATCH = """() => {
  window.lengths = [];
  new MutationObserver(() => {
    const words = [...document.querySelectorAll(".reply .words")].at(-1);
    if (words && words.textContent.length !== window.lengths.at(-1)) window.lengths.push(words.textContent.length);
  }).observe(document.getElementById("log"), { childList: true, subtree: true });
}"""
# Notes, while a reply streams, what is underlined, and by which legend.
MARKED = """() => {
  window.marked = [];
  new MutationObserver(() => {
    const reply = [...document.querySelectorAll(".reply.pending")].at(-1);
    const count = reply?.querySelectorAll(".token.drafted").length;
    if (count) window.marked.push([count, reply.querySelector(".facts").textContent]);
  }).observe(document.getElementById("log"), { childList: true, subtree: true });
}"""
# The line at an element's text.
LINE = "(element) => getComputedStyle(element).textDecorationLine"


class Visit:
    """A page of the playground, its requests and its errors."""

    def __init__(self, context, url):
        from playwright.sync_api import expect

        self.expect = expect
        self.page = context.new_page()
        self.problems: list[str] = []
        self.asked: list[Any] = []
        self.bodies: list[Any] = []
        self.page.on("console", self._told)
        self.page.on("pageerror", lambda error: self.problems.append(f"thrown: {error}"))
        self.page.on("request", self._requested)
        self.page.on("requestfailed", self._failed)
        self.page.goto(url)

    def _told(self, message):
        if message.type in ("error", "warning", "assert"):
            self.problems.append(f"{message.type}: {message.text}")

    def _requested(self, request):
        self.asked.append(urlsplit(request.url))
        if request.method == "POST":
            self.bodies.append(request.post_data_json)

    def _failed(self, request):
        if request.failure != "net::ERR_ABORTED":  # the page itself aborts a request to stop a reply
            self.problems.append(f"failed: {request.url} {request.failure}")

    def at(self, selector):
        return self.page.locator(selector)

    def ready(self):
        """Wait until the page has loaded the server's models."""
        self.expect(self.at("#state")).to_have_attribute("data-state", "ready")
        self.at("#starters button").first.wait_for()
        return self

    def ask_for(self, **fields):
        """Add request fields for which the page has no control."""
        self.page.unroute_all()
        self.page.route(
            "**/v1/chat/completions",
            lambda route: route.continue_(post_data=json.dumps({**route.request.post_data_json, **fields})),
        )

    def set(self, **values):
        """Sampling controls, by their API names."""
        if not self.at("#settings").is_visible():
            self.at("#tune").click()
        for name, value in values.items():
            self.at(f"#set-{name}").fill(str(value))

    def say(self, text=QUESTION):
        """Send a message, by keyboard."""
        self.at("#prompt").fill(text)
        self.at("#prompt").press("Enter")

    def reply(self, text=QUESTION):
        """The text of a reply, after its end, without the names of silent tokens."""
        count = self.at(".reply").count()
        self.say(text)
        self.expect(self.at(".reply:not(.pending)")).to_have_count(count + 1)
        return self.text()

    def text(self):
        """The last reply's."""
        return self.at(".reply").last.evaluate(
            "(reply) => [...reply.querySelector('.words').childNodes]"
            ".filter((n) => !n.classList?.contains('silent')).map((n) => n.textContent).join('')"
        )


@contextlib.contextmanager
def visiting(browser, url, allowed=None, **context):
    """A visit without errors except those that match `allowed`, and without requests to other hosts."""
    with browser.new_context(**{"viewport": DESKTOP, "reduced_motion": "reduce", **context}) as opened:
        opened.set_default_timeout(PATIENCE)
        visit = Visit(opened, url)
        yield visit
        assert [p for p in visit.problems if not (allowed and re.search(allowed, p))] == []
        assert {asked.netloc for asked in visit.asked} == {urlsplit(url).netloc}
