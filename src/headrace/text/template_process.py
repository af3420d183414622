"""`TemplateProcess`: renders chat templates, which are untrusted programs, in a process that can be killed.

render ──> one JSON line to the process ──> Jinja's immutable sandbox ──> one JSON line back
             └── over its time or size limit, or dead: killed, and the next call starts another
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from headrace.errors import CheckpointError, HeadraceError, RequestError
from headrace.text.chat import MAX_CHARACTERS, ChatTemplate
from headrace.text.variables import template_variables

__all__ = ["SECONDS", "TemplateProcess", "serve_templates"]

SECONDS = 2.0
"""Time limit of a template. A usual one takes a millisecond."""
START_SECONDS = 20.0
MEMORY = 1 << 30
"""Limit of the process's address space, in bytes."""
MAX_LINE = 4 * MAX_CHARACTERS
"""Limit of an answer, in bytes."""
READ = 1 << 16
MAX_MESSAGE = 1000
"""Limit of a template's error message, in characters."""
MAX_COMPILED = 16
"""Compiled templates that a process keeps, at most."""
MAIN = "import sys; sys.path.append(sys.argv[1]); from headrace.text.template_process import serve_templates as f; f()"
"""This package's folder is last on the path, for where headrace is imported without being installed."""


class TemplateProcess:
    """One process, started on first use, that renders one conversation at a time, for one thread at a time."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Any] | None = None

    def __enter__(self) -> TemplateProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def render(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | str | None = None,
    ) -> str:
        """What `ChatTemplate.render` gives, within the limits. Raises its errors, and `CheckpointError` at a limit."""
        return self.run(
            {
                "source": dict(template.sources),
                "special": dict(template.variables),
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
                "variables": {},
            }
        )

    def run(self, job: Mapping[str, Any]) -> str:
        """Render a job (see `serve_templates`). Raises as `render`, and `ChildProcessError` if no process starts."""
        try:
            line = json.dumps(job, default=_as_plain).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"messages: a chat template takes plain JSON values: {error}", "messages") from None
        process = self._running()
        try:
            answer = json.loads(_exchange(process, line, self._seconds))
        except TimeoutError:
            self.close()
            raise CheckpointError(f"the chat template took longer than {self._seconds:g} s and was stopped") from None
        except (OSError, ValueError):
            self.close()
            raise CheckpointError(
                "the chat template broke its process: it asked for too much memory, or wrote too much"
            ) from None
        except BaseException:  # an interrupt: the answer would be the next job's
            self.close()
            raise
        if "error" not in answer:
            return str(answer["text"])
        if answer["param"] is None:
            raise CheckpointError(answer["error"])
        raise RequestError(answer["error"], answer["param"])

    def start(self) -> None:
        """Start the process unless it runs, so that the first conversation does not wait for it."""
        self._running()

    def close(self) -> None:
        """End the process; a later call starts another."""
        self._process = None
        if self._end is not None:
            self._end()

    @property
    def pid(self) -> int | None:
        """The process's id, if it runs."""
        return None if self._process is None else self._process.pid

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            process = self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", MAIN, str(Path(__file__).parents[2])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
            self._end = weakref.finalize(self, _kill, process)
            try:
                _exchange(process, b"", START_SECONDS)
            except BaseException as error:  # a half started process would give the next caller this caller's answer
                self.close()
                if isinstance(error, (OSError, ValueError)):
                    raise ChildProcessError("the process for chat templates does not start") from None
                raise
        return self._process


def _as_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return list(value)
    raise TypeError(f"{type(value).__name__} is none")


def _exchange(process: subprocess.Popen[bytes], line: bytes, seconds: float) -> bytes:
    """Send a line, and read the answer's. `TimeoutError`: not in time; `ValueError`: too long; `OSError`: it died."""
    assert process.stdin is not None and process.stdout is not None
    deadline = time.monotonic() + seconds
    _write(process.stdin, line)
    ready = select.poll()
    ready.register(process.stdout, select.POLLIN)
    pieces: list[bytes] = []
    size = 0
    while not pieces or not pieces[-1].endswith(b"\n"):
        if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        pieces.append(os.read(process.stdout.fileno(), READ))
        size += len(pieces[-1])
        if not pieces[-1]:
            raise BrokenPipeError
        if size > MAX_LINE:
            raise ValueError
    return b"".join(pieces)


def _write(stream: IO[bytes], line: bytes) -> None:
    """Write the whole line: the process reads whenever no job runs, so this does not block for long."""
    left = memoryview(line)
    while left:
        left = left[stream.write(left) :]


def _kill(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.kill()
    process.stdin.close()
    process.stdout.close()
    process.wait()


def serve_templates() -> None:
    """The process's main: jobs from standard input, answers to standard output, until end of file.

    A job has `source` (a template, or a mapping of names to templates), `special` (the special tokens' texts),
    `messages`, `add_generation_prompt` and `variables`, each with the request field that it came from; `tools` if any.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    compiled: dict[str, ChatTemplate] = {}
    print(flush=True)
    for line in sys.stdin:
        answer: dict[str, Any]
        try:
            answer = {"text": _render(json.loads(line), compiled)}
        except RecursionError:
            answer = _fault(RequestError("messages or the template's variables are nested too deeply", "messages"))
        except HeadraceError as error:
            answer = _fault(error)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _fault(error: HeadraceError) -> dict[str, Any]:
    """Of a template, or of the request's field `param`."""
    return {"error": str(error)[:MAX_MESSAGE], "param": error.param if isinstance(error, RequestError) else None}


def _render(job: Mapping[str, Any], compiled: dict[str, ChatTemplate]) -> str:
    key = json.dumps([job["source"], job["special"]])
    if key not in compiled:
        while len(compiled) >= MAX_COMPILED:
            del compiled[next(iter(compiled))]
        compiled[key] = ChatTemplate(job["source"], job["special"])
    template = compiled[key]
    variables = template_variables(template, job["variables"])
    return template.render(job["messages"], job["add_generation_prompt"], job.get("tools"), **variables)
