"""`TemplateWorker`: renders chat templates, which are untrusted programs, in a process that can be killed.

render ──> one JSON line to the worker ──> Jinja's immutable sandbox ──> one JSON line back
             └── over its time or size limit, or dead: killed, and the next call starts another
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import sys
from collections.abc import Mapping
from typing import Any

from headrace.errors import HeadraceError, RequestError
from headrace.serve.errors import RefusedError, UnavailableError
from headrace.text.chat import MAX_CHARACTERS, ChatTemplate
from headrace.text.variables import template_variables

__all__ = ["TemplateWorker", "serve_templates"]

SECONDS = 2.0
"""Time limit of a template. A usual one takes a millisecond."""
START_SECONDS = 20.0
MEMORY = 1 << 30
"""Limit of a worker's address space, in bytes."""
MAX_LINE = 4 * MAX_CHARACTERS
"""Limit of a worker's answer, in bytes."""
MAX_MESSAGE = 1000
"""Limit of a template's error message, in characters."""
MAX_COMPILED = 16
"""Compiled templates that a worker keeps, at most."""


class TemplateWorker:
    """One process, started on first use, that renders one conversation at a time."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Start the process unless it runs, so that the first conversation does not wait for it."""
        async with self._turn:
            await self._running()

    async def render(self, job: Mapping[str, Any]) -> str:
        """Render a job (see `serve_templates`). `RefusedError`: the template or the messages are the cause.

        If the caller is cancelled, the job still runs to its end or limit: killing the process would delay others.
        """
        line = json.dumps(job).encode() + b"\n"
        await self._turn.acquire()
        work = asyncio.ensure_future(self._work(line))
        work.add_done_callback(self._done)
        answer = await asyncio.shield(work)
        if "error" in answer:
            raise RefusedError(answer["error"], answer["param"])
        return str(answer["text"])

    def _done(self, work: asyncio.Future[Any]) -> None:
        self._turn.release()
        if not work.cancelled():
            work.exception()  # retrieved, since its caller may have been cancelled

    async def _work(self, line: bytes) -> dict[str, Any]:
        process = await self._running()
        try:
            return await asyncio.wait_for(self._exchange(process, line), self._seconds)
        except BaseException as error:
            await self._kill()
            if isinstance(error, TimeoutError):
                raise RefusedError(
                    f"the chat template took longer than {self._seconds:g} s and was stopped", "messages"
                ) from None
            if isinstance(error, (OSError, ValueError)):
                raise RefusedError(
                    "the chat template broke its process: it asked for too much memory, or wrote too much", "messages"
                ) from None
            raise

    async def close(self) -> None:
        """End the process."""
        async with self._turn:
            await self._kill()

    @property
    def pid(self) -> int | None:
        """The process's id, if it runs."""
        return None if self._process is None else self._process.pid

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is not None:
            await self._kill()
        if self._process is None:
            process = self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                "from headrace.serve.templates import serve_templates; serve_templates()",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=MAX_LINE,
                start_new_session=True,
            )
            assert process.stdout is not None
            try:
                greeting = await asyncio.wait_for(process.stdout.readline(), START_SECONDS)
            except BaseException as error:  # a half started process would give the next caller this caller's answer
                await self._kill()
                if isinstance(error, TimeoutError):
                    raise UnavailableError("the process for chat templates does not start") from None
                raise
            if not greeting:
                await self._kill()
                raise UnavailableError("the process for chat templates does not start")
        return self._process

    async def _exchange(self, process: asyncio.subprocess.Process, line: bytes) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(line)
        await process.stdin.drain()
        answer: dict[str, Any] = json.loads(await process.stdout.readline())
        return answer

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()


def serve_templates() -> None:
    """The worker's main: jobs from standard input, answers to standard output, until end of file.

    A job has `source` (a template, or a mapping of names to templates), `special` (the special tokens' texts),
    `messages`, `add_generation_prompt` and `variables`, each with the request field that it came from.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    compiled: dict[str, ChatTemplate] = {}
    print(flush=True)
    for line in sys.stdin:
        answer: dict[str, Any]
        try:
            answer = {"text": _render(json.loads(line), compiled)}
        except RecursionError:
            answer = {"error": "the messages or the template's variables are nested too deeply", "param": "messages"}
        except RequestError as error:
            answer = {"error": str(error)[:MAX_MESSAGE], "param": error.param or "messages"}
        except HeadraceError as error:
            answer = {"error": str(error)[:MAX_MESSAGE], "param": "chat_template"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _render(job: Mapping[str, Any], compiled: dict[str, ChatTemplate]) -> str:
    key = json.dumps([job["source"], job["special"]])
    if key not in compiled:
        while len(compiled) >= MAX_COMPILED:
            del compiled[next(iter(compiled))]
        compiled[key] = ChatTemplate(job["source"], job["special"])
    template = compiled[key]
    return template.render(
        job["messages"], job["add_generation_prompt"], **template_variables(template, job["variables"])
    )
