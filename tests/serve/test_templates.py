"""Untrusted chat templates, in a process that can be killed."""

import asyncio
import os
import signal

import pytest

from headrace.errors import RequestError
from headrace.serve.templates import TemplateWorker
from serve.gateway_kit import begun

MESSAGES = [{"role": "user", "content": "hello"}]
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def job(source=PLAIN, messages=MESSAGES, **variables):
    told = {name: ("chat_template_kwargs", value) for name, value in variables.items()}
    return {
        "source": source,
        "special": {"bos_token": "<s>"},
        "messages": messages,
        "add_generation_prompt": True,
        "variables": told,
    }


def run(scenario, seconds=5.0):
    async def whole():
        worker = TemplateWorker(seconds)
        try:
            return await scenario(worker)
        finally:
            await worker.close()

    return asyncio.run(whole())


def test_it_renders_what_it_is_given():
    async def scenario(worker):
        assert await worker.render(job()) == "<user>hello"
        pid = worker.pid
        assert await worker.render(job("{{ bos_token }}{{ wish }}", wish="é\U0001f642")) == "<s>é\U0001f642"
        assert worker.pid == pid
        odd = [{"role": "user", "content": "\udc80 \x00 \u2028\n"}]
        assert await worker.render(job(messages=odd)) == "<user>\udc80 \x00 \u2028\n"

    run(scenario)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "took longer than 0.5 s"),
        ("{% set ns = namespace(x='a' * 1000) %}{% for i in range(60000) %}{{ ns.x }}{% endfor %}", "writes more than"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set x = 'a' * 10**12 %}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "lack|unsafe"),
        ("{% import 'os' as os %}", "failed|unsafe"),
        ("{{ raise_exception('no thanks') }}", "no thanks"),
        ("{% if %}", "does not compile"),
        ("{{ [1] * 400000000 }}", "unsafe|memory"),
        ("{%- macro f(x) -%}{{ f(x) }}{%- endmacro -%}{{ f(1) }}", "failed"),
        ("{{ 'x'.format() | center(2**40) }}", "failed|memory|unsafe"),
    ],
)
def test_a_hostile_template_is_refused_and_the_next_one_works(source, says):
    async def scenario(worker):
        await worker.start()
        with pytest.raises(RequestError, match=says) as refused:
            await worker.render(job(source))
        assert refused.value.param in ("messages", "chat_template")
        assert await worker.render(job()) == "<user>hello"

    run(scenario, 0.5)


def test_a_variable_that_the_template_does_not_use_is_refused():
    async def scenario(worker):
        with pytest.raises(RequestError, match="does not use enable_thinking") as refused:
            await worker.render(job(enable_thinking=True))
        assert refused.value.param == "chat_template_kwargs"
        shown = await worker.render(job("{{ 'on' if enable_thinking else 'off' }}", enable_thinking=True))
        assert shown == "on"

    run(scenario)


def test_a_worker_that_dies_is_replaced():
    async def scenario(worker):
        await worker.start()
        pid = worker.pid
        os.kill(pid, signal.SIGKILL)
        try:  # it may be noticed before the job is sent, or by its answer that never comes
            assert await worker.render(job()) == "<user>hello"
        except RequestError:
            assert await worker.render(job()) == "<user>hello"
        assert worker.pid != pid

    run(scenario)


def test_a_caller_that_leaves_holds_up_others_for_its_limit_at_most():
    async def scenario(worker):
        await worker.start()
        endless = await begun(
            worker.render(job("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"))
        )
        unheard = await begun(worker.render(job()))
        waiting = await begun(worker.render(job()))
        endless.cancel(), unheard.cancel()
        assert await waiting == "<user>hello"
        assert endless.cancelled() and unheard.cancelled()

    run(scenario, 0.5)


def test_a_caller_that_leaves_does_not_cost_others_the_process():
    async def scenario(worker):
        await worker.start()
        pid = worker.pid
        for _ in range(5):
            leaving = await begun(worker.render(job()))
            waiting = await begun(worker.render(job("{{ messages[0].content }}!")))
            leaving.cancel()
            assert await waiting == "hello!"
        assert worker.pid == pid

    run(scenario)
