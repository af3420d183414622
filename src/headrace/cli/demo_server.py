"""The server of `headrace demo`, and what it shows over HTTP: a completion, and a conversation with a tool."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from headrace.errors import ConfigError, RequestError

__all__ = ["REPLY_TOKENS", "serve_demo"]

NAME = "demo"
"""The served model's name."""
REPLY_TOKENS = 48
GREEDY = {"temperature": 0, "max_tokens": REPLY_TOKENS}
PASSED = 0.9
"""A model of this accuracy has learnt to call its tool."""
SEED = 180
"""It selects the questions, both about one person."""
SEEN = "at the garden"
"""The result that the demo sends for each call of its tool."""


def serve_demo(checkpoint: Path, summary: dict[str, Any], once: bool) -> None:
    """Serve the model until Ctrl-C, and show a call of a tool; with `once`, end after that.

    With `once`, a completion must also be the reply of this process. Raises `RuntimeError` where the server does not
    answer as it must.
    """
    server = _server(checkpoint)

    async def main() -> None:
        over = asyncio.Event()
        shows: list[asyncio.Future[None]] = []

        def ready(_: Any) -> None:
            print(f"\nServing it at {server.url} · playground: {server.url}/ in a browser · Ctrl-C ends it")
            shows.append(asyncio.ensure_future(asyncio.to_thread(_show, server.url, summary, once)))
            if once:
                shows[0].add_done_callback(lambda _: over.set())

        await server.run(ready, until=over)
        await asyncio.gather(*shows)

    asyncio.run(main())


def _show(url: str, summary: dict[str, Any], once: bool) -> None:
    from headrace.cli.remote import Remote

    remote = Remote(url)
    asked = {**GREEDY, "ignore_eos": True}
    body = json.dumps({"model": NAME, "prompt": summary["prompt"], **asked})
    print(f"  curl {url}/v1/completions -d '{body}'", flush=True)
    if once:
        text = remote.complete(NAME, summary["prompt"], asked)["choices"][0]["text"]
        print(f"  ↳ {text.strip()}")
        if text != summary["reply"]:
            raise RuntimeError(f"the server answered {text!r}, not {summary['reply']!r}: a bug in headrace")
    try:
        called = _show_tool(remote)
    except RequestError as error:
        if once:
            raise
        # The model of an earlier version, or Ctrl-C.
        print(f"  {error}", flush=True)
        return
    if once and not called and summary["accuracy"] >= PASSED:
        raise RuntimeError("the model passed its exam, but the server's answer calls no tool: a bug in headrace")


def _show_tool(remote: Any) -> bool:
    """Ask a question that needs the tool, answer the call, and ask one that does not. Returns whether there was a call.

    Whether to call the tool is the model's choice. At last, the first question is asked without it.
    """
    from headrace.train.tinyworld import TOOL, held_out_question

    def ask(*messages: dict[str, Any], **tools: Any) -> dict[str, Any]:
        message: dict[str, Any] = remote.message(NAME, list(messages), {**tools, **GREEDY})
        return message

    auto = {"tools": [TOOL], "tool_choice": "auto"}
    function = TOOL["function"]
    offered = f"{function['name']}({', '.join(function['parameters']['properties'])})"
    print(f"\nWith the tool {offered} at /v1/chat/completions, tool_choice auto:")
    where, home = ({"role": "user", "content": held_out_question(kind, SEED).question} for kind in ("tool", "home"))
    answer = ask(where, **auto)
    print(f"  {where['content']} ↳ {_shown(answer)}")
    calls = answer.get("tool_calls") or []
    if calls:
        responses = [{"role": "tool", "tool_call_id": call["id"], "content": SEEN} for call in calls]
        print(f"  {SEEN} ↳ {_shown(ask(where, answer, *responses, **auto))}")
    print(f"  {home['content']} ↳ {_shown(ask(home, **auto))}")
    print(f"Without it:\n  {where['content']} ↳ {_shown(ask(where))}", flush=True)
    return bool(calls)


def _shown(message: dict[str, Any]) -> str:
    functions = [call["function"] for call in message.get("tool_calls") or []]
    calls = [f"calls {function['name']} with {function['arguments']}" for function in functions]
    return " · ".join(text for text in ((message.get("content") or "").strip(), *calls) if text)


def _server(checkpoint: Path) -> Any:
    """The server at the default port, or at a free one."""
    from headrace.serve.server import Server
    from headrace.serve.settings import ServeSettings

    for port in (ServeSettings.port, 0):
        try:
            return Server(str(checkpoint), {}, ServeSettings(port=port, served_model_name=(NAME,)))
        except ConfigError:
            if port == 0:
                raise
