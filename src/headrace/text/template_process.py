"""`TemplateProcess`: renders chat templates, which are untrusted programs, in a process that can be killed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.errors import CheckpointError, HeadraceError, RequestError
from headrace.text.chat import ChatTemplate
from headrace.text.line_process import LineProcess, serve_lines
from headrace.text.variables import template_variables

__all__ = ["SECONDS", "TemplateProcess", "serve_templates"]

SECONDS = 2.0
"""Time limit of a template. A usual one takes a millisecond."""
MAX_MESSAGE = 1000
"""Limit of a template's error message, in characters."""
MAX_COMPILED = 16
"""Compiled templates that a process keeps, at most."""


class TemplateProcess:
    """One process, started on first use, that renders one conversation at a time, for one thread at a time."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._process = LineProcess("chat templates", __name__, "serve_templates", seconds)

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
            line = json.dumps(job, default=_as_plain).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"messages: a chat template takes plain JSON values: {error}", "messages") from None
        try:
            answer = self._process.run(line)
        except TimeoutError:
            raise CheckpointError(f"the chat template took longer than {self._seconds:g} s and was stopped") from None
        except BrokenPipeError:
            raise CheckpointError(
                "the chat template broke its process: it asked for too much memory, or wrote too much"
            ) from None
        if "error" not in answer:
            return str(answer["text"])
        if answer["param"] is None:
            raise CheckpointError(answer["error"])
        raise RequestError(answer["error"], answer["param"])

    def start(self) -> None:
        """Start the process unless it runs, so that the first conversation does not wait for it."""
        self._process.start()

    def close(self) -> None:
        """End the process; a later call starts another."""
        self._process.close()

    @property
    def pid(self) -> int | None:
        """The process's id, if it runs."""
        return self._process.pid


def _as_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return list(value)
    raise TypeError(f"{type(value).__name__} is none")


def serve_templates() -> None:
    """The process's main.

    A job has `source` (a template, or a mapping of names to templates), `special` (the special tokens' texts),
    `messages`, `add_generation_prompt` and `variables`, each with the request field that it came from; `tools` if any.
    """
    compiled: dict[str, ChatTemplate] = {}

    def answer(job: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return {"text": _render(job, compiled)}
        except RecursionError:
            return _fault(RequestError("messages or the template's variables are nested too deeply", "messages"))
        except HeadraceError as error:
            return _fault(error)

    serve_lines(answer)


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
