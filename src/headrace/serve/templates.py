"""`TemplateWorker`: a `TemplateProcess` for concurrent requests, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from headrace.errors import CheckpointError
from headrace.serve.errors import RefusedError, UnavailableError
from headrace.text.template_process import SECONDS, TemplateProcess

__all__ = ["TemplateWorker"]

T = TypeVar("T")


class TemplateWorker:
    """One thread and its process, in which conversations wait for their turn. Must be closed.

    `field` is the request's field that errors of the template itself name.
    """

    def __init__(self, seconds: float = SECONDS, field: str = "chat_template") -> None:
        self._field = field
        self._process = TemplateProcess(seconds)
        self._thread = ThreadPoolExecutor(1, "template")

    async def start(self) -> None:
        """Start the process unless it runs, so that the first conversation does not wait for it."""
        await self._run(self._process.start)

    async def render(self, job: Mapping[str, Any]) -> str:
        """Render a job (see `serve_templates`). `RefusedError`: the template or the messages are the cause.

        If the caller is cancelled, the job still runs to its end or limit: killing the process would delay others.
        """
        return await self._run(lambda: self._process.run(job))

    async def close(self) -> None:
        """End the process."""
        await self._run(self._process.close)
        self._thread.shutdown(wait=False)

    @property
    def pid(self) -> int | None:
        """The process's id, if it runs."""
        return self._process.pid

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except CheckpointError as error:
            raise RefusedError(str(error), self._field) from None
        except ChildProcessError as error:
            raise UnavailableError(str(error)) from None
