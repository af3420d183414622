"""The playground in a real browser, over a real server."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import threading

import httpx
import pytest

from serve.browser_kit import FAINT, LINE, MARKED, PATIENCE, PHONE, QUESTION, WATCH, WIDE, visiting
from serve.http_kit import served

ARGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
)
ATTEMPTS = 5
"""To do something while a reply is under way, before a quick engine has ended it."""
LONG = {"ignore_eos": True, "max_tokens": 300}

FOCUSED = "() => document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
DRAWN = "(canvas) => canvas.toDataURL()"


@pytest.fixture(scope="module")
def browser():
    """A browser. It ends with this module: its event loop, in this thread, is in the way of other tests'."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no browser found: the playground's tests need Debian's chromium (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    playwright.expect.set_options(timeout=PATIENCE)
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=list(ARGS))
        yield started
        started.close()


@contextlib.contextmanager
def crowd(server, size=8):
    """`size` sequences beside the page's, again and again until the end of the block."""
    over = threading.Event()

    def ask():
        body = {"model": server.model, "prompt": "Once upon a time", "n": size, **LONG}
        with httpx.Client(base_url=server.url, timeout=60) as http, contextlib.suppress(httpx.HTTPError):
            while not over.is_set():
                http.post("/v1/completions", json=body)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def asked_of_the_api(server, **fields):
    body = {"model": server.model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, **fields}
    answer = server.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_a_chat_streams_the_answer_of_the_api(browser, server):
    with visiting(browser, server.url) as visit:
        visit.ready().ask_for(**LONG)
        visit.expect(visit.at("#model")).to_have_text(server.model)
        visit.page.evaluate(WATCH)
        visit.set(temperature=0)
        text = visit.reply()
        assert text == asked_of_the_api(server, **LONG)["message"]["content"]
        lengths = visit.page.evaluate("() => window.lengths")
        assert len(lengths) > 5 and lengths == sorted(lengths)
        facts = visit.at(".reply .facts")
        visit.expect(facts).to_contain_text(f"{LONG['max_tokens']} tokens")
        visit.expect(facts).to_contain_text("reached the longest reply")
        visit.ask_for(max_tokens=8)
        visit.reply("And who lives at the mill?")
        roles = [message["role"] for message in visit.bodies[-1]["messages"]]
        assert roles == ["user", "assistant", "user"]


def percent(p):
    return f"{p * 100:.0f}%" if p >= 0.0995 else f"{p * 100:.1f}%" if p >= 0.001 else "<0.1%"


def test_log_probabilities_are_the_apis_by_hover_and_by_focus(browser, server):
    choice = asked_of_the_api(server, logprobs=True, top_logprobs=5, max_tokens=8, ignore_eos=True)
    told = choice["logprobs"]["content"]
    with visiting(browser, server.url) as visit:
        visit.ready()
        visit.ask_for(max_tokens=8, ignore_eos=True)
        visit.set(temperature=0)
        visit.reply()
        assert visit.bodies[-1]["logprobs"] is True
        tokens, hint = visit.at(".reply .token"), visit.at("#hint")
        visit.expect(hint).to_be_hidden()
        shown = 0
        for i in range(tokens.count()):
            if i % 2:
                tokens.nth(i - 1).focus()
                visit.page.keyboard.press("ArrowRight")
            else:
                tokens.nth(i).hover()
            heads = [line.replace("\u2212", "-") for line in hint.locator("p").all_inner_texts()]
            entries, shown = told[shown : shown + len(heads)], shown + len(heads)
            assert heads == [f"log p {entry['logprob']:.3f}".replace("-0.000", "0.000") for entry in entries]
            shares = [percent(math.exp(top["logprob"])) for entry in entries for top in entry["top_logprobs"]]
            assert hint.locator(".alt span").all_inner_texts() == shares
            visit.expect(hint.locator(".chosen")).to_have_count(len(heads))
            assert visit.at("[aria-describedby=hint]").count() == 1
        assert shown == len(told)
        visit.page.keyboard.press("Escape")
        visit.expect(hint).to_be_hidden()


def test_sampling_controls_act(browser, server):
    with visiting(browser, server.url) as visit:
        visit.ready().ask_for(ignore_eos=True, max_tokens=60)

        def fresh(**values):
            visit.page.keyboard.press("Control+k")
            visit.set(**values)
            return visit.reply()

        untouched = fresh()
        assert not {"temperature", "top_p", "top_k", "min_p", "seed"} & visit.bodies[-1].keys()
        assert fresh(temperature=0) == fresh(temperature=0) == fresh(temperature=1, top_k=1)
        seeded = fresh(temperature=1, top_k=0, seed=7)
        assert visit.bodies[-1]["seed"] == 7 and seeded == fresh() != fresh(seed=8)
        assert untouched != seeded
        visit.ask_for(ignore_eos=True)
        fresh(top_p=0.5, min_p=0.1, max_tokens=9)
        assert {name: visit.bodies[-1][name] for name in ("top_p", "min_p", "max_tokens")} == {
            "top_p": 0.5,
            "min_p": 0.1,
            "max_tokens": 9,
        }
        visit.expect(visit.at("#summary")).to_have_text(re.compile("Temperature 1 · top p 0.5 · min p 0.1 · seed 8"))
        visit.at("#system").fill("Answer in one word.")
        visit.reply()
        assert visit.bodies[-1]["messages"][0] == {"role": "system", "content": "Answer in one word."}
        visit.at("#reset").click()
        visit.reply()
        assert not {"temperature", "top_p", "min_p", "seed"} & visit.bodies[-1].keys()
        visit.at("#set-temperature + input[type=range]").fill("0.5")
        visit.expect(visit.at("#set-temperature")).to_have_value("0.5")


def begun(visit):
    """Begin a new chat, whose reply is under way."""
    visit.page.keyboard.press("Control+k")
    visit.say()
    visit.at(".reply .token").nth(2).wait_for(state="attached")


def test_escape_and_the_button_stop_a_reply(browser, server):
    with visiting(browser, server.url) as visit, crowd(server):
        visit.ready().ask_for(**LONG)
        for stop in (lambda: visit.page.keyboard.press("Escape"), visit.at("#send").click):
            for _ in range(ATTEMPTS):
                aborts = server.metric("headrace:aborts_total")
                begun(visit)
                stop()
                visit.at(".reply:not(.pending)").wait_for()
                visit.expect(visit.at("#send")).to_have_attribute("aria-label", "Send")
                if "stopped" in visit.at(".facts").inner_text():
                    break
            assert visit.at(".reply .token").count() < LONG["max_tokens"]
            while server.metric("headrace:aborts_total") == aborts:
                assert server.process.poll() is None


def test_a_new_chat_does_not_contain_the_reply_that_it_cut_off(browser, server):
    with visiting(browser, server.url) as visit, crowd(server):
        visit.ready().ask_for(**LONG)
        begun(visit)
        visit.page.keyboard.press("Control+k")
        visit.expect(visit.at(".turn")).to_have_count(0)
        visit.say()
        visit.at(".reply .token").nth(2).wait_for(state="attached")
        assert [message["role"] for message in visit.bodies[-1]["messages"]] == ["user"]
        visit.expect(visit.at(".turn")).to_have_count(2)


def test_the_live_picture_moves(browser, server):
    with visiting(browser, server.url) as visit:
        visit.ready()
        steps, tree, blocks = visit.at("#steps"), visit.at("#tree"), visit.at("#blocks-line")
        count, nodes = int(steps.get_attribute("data-count")), tree.get_attribute("data-nodes")
        drawn, told = [visit.at(f"#{name}").evaluate(DRAWN) for name in ("steps", "blocks")], blocks.inner_text()
        with crowd(server, 4):
            visit.expect(visit.at("#running")).not_to_have_text("0")
            visit.expect(visit.at("#speed")).not_to_have_text("0")
            visit.expect(blocks).not_to_have_text(told)
            visit.expect(tree).not_to_have_attribute("data-nodes", nodes)
            visit.expect(visit.at("#tree .channel.held").first).to_be_attached()
            first = steps.get_attribute("data-count")
            visit.expect(steps).not_to_have_attribute("data-count", first)
            assert all(visit.at(f"#{name}").evaluate(DRAWN) not in drawn for name in ("steps", "blocks"))
        visit.expect(visit.at("#running")).to_have_text("0")
        visit.expect(visit.at("#tree .channel.held")).to_have_count(0)
        assert int(steps.get_attribute("data-count")) > count
        steps.hover()
        visit.expect(visit.at("#step-line")).to_contain_text("decode")


def test_keys_alone_are_enough(browser, server):
    with visiting(browser, server.url) as visit:
        visit.ready()
        press, page = visit.page.keyboard.press, visit.page
        assert page.evaluate(FOCUSED) == "prompt"
        visit.at(".skip").focus()
        order = []
        for _ in range(9):
            press("Tab")
            order.append(page.evaluate(FOCUSED))
            assert (
                order[-1] in ("prompt", "log", "tint")
                or page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") == "solid"
            )
        assert order == ["new", "theme", "log", "BUTTON", "BUTTON", "BUTTON", "prompt", "send", "tune"]
        press("Enter")
        press("Tab")
        assert page.evaluate(FOCUSED) == "tint"
        press("Tab")
        assert page.evaluate(FOCUSED) == "system"
        press("Escape")
        visit.expect(visit.at("#settings")).to_be_hidden()
        assert page.evaluate(FOCUSED) == "tune"
        press("/")
        assert page.evaluate(FOCUSED) == "prompt" and visit.at("#prompt").input_value() == ""
        page.keyboard.type("1/2")
        press("Shift+Enter")
        assert visit.at("#prompt").input_value() == "1/2\n"
        press("Enter")
        visit.expect(visit.at(".reply:not(.pending)")).to_have_count(1)
        press("Control+k")
        visit.expect(visit.at(".turn")).to_have_count(0)
        visit.expect(visit.at("#welcome")).to_be_visible()
        assert page.evaluate(FOCUSED) == "prompt"


def test_a_phone_has_all_of_it_and_scrolls_one_way(browser, server):
    with visiting(browser, server.url, viewport=PHONE, has_touch=True, is_mobile=True) as visit:
        visit.ready().ask_for(temperature=0)
        assert visit.page.evaluate(WIDE) == []
        visit.reply()
        visit.at(".reply .token").first.tap()
        visit.expect(visit.at("#hint")).to_be_visible()
        assert visit.page.evaluate(WIDE) == []
        visit.at("#tune").tap()
        for control in visit.at("#settings").locator("input, textarea, button").all():
            control.tap(trial=True)
        assert visit.page.evaluate(WIDE) == []
        visit.at("#fold").tap()
        visit.expect(visit.at("#settings")).to_be_hidden()
        for part in (
            "#running",
            "#steps",
            "#blocks",
            "#tree-box",
            "#tree-line",
            "#send",
            "#prompt",
            "#tune",
            "#new",
            "#theme",
        ):
            visit.at(part).click(trial=True)
        assert visit.page.evaluate(WIDE) == []
        assert visit.at("#log").evaluate("(log) => log.clientHeight") > 100
        visit.at("#tune").tap()
        visit.expect(visit.at("#panel")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_readable(browser, server, scheme):
    with visiting(browser, server.url, color_scheme=scheme, allowed="404") as visit:
        visit.ready()
        assert visit.page.evaluate(FAINT) == []
        visit.set(temperature=2)
        visit.ask_for(max_tokens=40, ignore_eos=True)
        visit.reply()
        visit.expect(visit.at("#tree text").first).to_be_visible()
        for token in visit.at(".reply .token:visible").all()[::8]:  # a part of a character has no text to hover
            token.hover()
            assert visit.page.evaluate(FAINT) == []
        visit.ask_for(model="another")
        visit.say()
        visit.expect(visit.at("#notice-text")).to_contain_text("does not exist")
        assert visit.page.evaluate(FAINT) == []
        visit.expect(visit.at("#prompt")).to_have_value(QUESTION)


def test_the_colours_can_be_chosen_and_stay_so(browser, server):
    with visiting(browser, server.url, color_scheme="light") as visit:
        visit.ready()
        dark = "() => getComputedStyle(document.body).backgroundColor"
        light = visit.page.evaluate(dark)
        visit.at("#theme").click()
        visit.at("#theme").click()
        visit.expect(visit.at("html")).to_have_attribute("data-theme", "dark")
        visit.page.reload()
        assert visit.page.evaluate(dark) != light


def test_a_key_is_asked_for_and_used(browser, tinyworld_checkpoint):
    with (
        served(tinyworld_checkpoint, "--api-key", "secret") as server,
        visiting(browser, server.url, allowed="401") as visit,
    ):
        visit.expect(visit.at("#notice-text")).to_contain_text("API key")
        visit.expect(visit.at("#key")).to_be_focused()
        visit.expect(visit.at("#state")).to_have_attribute("data-state", "locked")
        visit.page.keyboard.type("wrong")
        visit.page.keyboard.press("Enter")
        visit.expect(visit.at("#key")).to_have_value("")
        visit.expect(visit.at("#notice-text")).to_contain_text("API key")
        visit.at("#key").fill("secret")
        visit.at("#key").press("Enter")
        visit.ready()
        visit.expect(visit.at("#notice")).to_be_hidden()
        visit.reply()
        assert all("secret" not in asked.geturl() for asked in visit.asked)


def test_a_reply_survives_an_engine_restart_and_a_lost_server_is_shown(browser, tinyworld_checkpoint):
    with (
        served(tinyworld_checkpoint) as server,
        visiting(browser, server.url, allowed="ERR_CONNECTION|ERR_INCOMPLETE|ERR_NETWORK") as visit,
    ):
        visit.ready().ask_for(**LONG)
        whole = asked_of_the_api(server, **LONG)["message"]["content"]
        visit.set(temperature=0)
        with crowd(server):
            for _ in range(ATTEMPTS):
                begun(visit)
                os.kill(server.instance_pid(), signal.SIGKILL)
                visit.expect(visit.at(".reply:not(.pending)")).to_have_count(1)
                visit.expect(visit.at("#state")).to_have_attribute("data-state", "ready")
                if "resumed 1×" in visit.at(".facts").inner_text():
                    break
        visit.expect(visit.at(".facts")).to_contain_text("resumed 1×")
        assert visit.text() == whole
        server.process.terminate()
        assert server.process.wait(30) == 0
        visit.expect(visit.at("#state")).to_have_attribute("data-state", "offline")
        visit.say()
        visit.expect(visit.at("#notice-text")).to_contain_text("cannot be reached")
        visit.expect(visit.at("#prompt")).to_have_value(QUESTION)
        visit.expect(visit.at("#retry")).to_be_visible()
        assert visit.problems != []


def test_accepted_drafts_are_underlined_while_a_reply_streams_and_after_it(browser, tinyworld_checkpoint):
    asked = {"min_tokens": 60, "max_tokens": 60}  # an end token has no text
    with (
        served(tinyworld_checkpoint, "--speculate", "ngram", "--gamma", "4") as server,
        visiting(browser, server.url) as visit,
    ):
        text = asked_of_the_api(server, **asked)["message"]["content"]
        predicted = {**asked, "prediction": {"type": "content", "content": text}}
        choice = asked_of_the_api(server, **predicted, explain=True, logprobs=True)
        expected = choice["accepted_drafts"]
        assert 30 < len(expected) < 50
        visit.ready().ask_for(**predicted)
        visit.set(temperature=0)
        visit.page.evaluate(MARKED)
        assert visit.reply() == text
        tokens, facts = visit.at(".reply .token"), visit.at(".reply .facts .drafted")
        spans = tokens.evaluate_all(
            "(all) => all.map((span) => [span.textContent, span.classList.contains('drafted')])"
        )
        assert [text for text, _ in spans] == [entry["token"] for entry in choice["logprobs"]["content"]]
        assert [i for i, (_, drafted) in enumerate(spans) if drafted] == expected
        lines = tokens.evaluate_all(f"(all) => all.map({LINE})")
        assert [i for i, line in enumerate(lines) if line == "underline"] == expected
        visit.expect(facts).to_have_text(re.compile(f"^{len(expected)} of \\d+ drafts right, γ ≤ \\d+$"))
        assert facts.evaluate(LINE) == "underline" and "drafted" in facts.get_attribute("title")
        for i, head in ((expected[0], "· drafted"), (next(i for i in range(60) if i not in expected), "log p")):
            tokens.nth(i).hover()
            assert ("drafted" in head) == ("drafted" in visit.at("#hint p").inner_text())
        marked = visit.page.evaluate("() => window.marked")
        counts = [count for count, _ in marked]
        assert len({*counts}) > 3 and counts == sorted(counts) and {legend for _, legend in marked} == {"drafted"}


def test_without_drafts_nothing_is_underlined(browser, server):
    with visiting(browser, server.url) as visit:
        visit.ready().ask_for(max_tokens=20, ignore_eos=True)
        visit.reply()
        assert {*visit.at(".reply .token").evaluate_all(f"(all) => all.map({LINE})")} == {"none"}
        visit.expect(visit.at(".drafted")).to_have_count(0)


WHO = {
    "type": "object",
    "properties": {"who": {"enum": ["Mia", "Finn"]}},
    "required": ["who"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "find", "parameters": WHO}}


def test_a_schema_and_a_tool(browser, server):
    with visiting(browser, server.url) as visit:
        visit.ready().ask_for(max_tokens=80)
        visit.page.click("#tune")
        visit.page.fill("#schema", json.dumps(WHO))
        assert json.loads(visit.reply())["who"] in ("Mia", "Finn")
        visit.expect(visit.at(".reply .facts")).to_contain_text(" forced")
        visit.page.fill("#schema", "{")
        visit.page.fill("#prompt", "again")
        visit.page.keyboard.press("Enter")
        visit.expect(visit.at("#notice-text")).to_contain_text("The schema: this is no JSON")
        visit.page.keyboard.press("Control+k")
        visit.page.fill("#schema", "")
        visit.page.fill("#tools", json.dumps([TOOL]))
        visit.ask_for(max_tokens=80, tool_choice="required", parallel_tool_calls=False)
        visit.page.fill("#prompt", QUESTION)
        visit.page.keyboard.press("Enter")
        visit.expect(visit.at(".reply .call")).to_have_text(re.compile(r'^find \{"who": "(Mia|Finn)"\}$'))
        visit.expect(visit.at("#prompt")).to_have_attribute("placeholder", "Write what find returns")
        visit.ask_for(max_tokens=4, tool_choice="none")
        visit.reply("at the mill")
        asked, called, returned = visit.bodies[-1]["messages"]
        assert (asked["role"], called["role"], returned["role"]) == ("user", "assistant", "tool")
        assert returned["tool_call_id"] == called["tool_calls"][0]["id"]
