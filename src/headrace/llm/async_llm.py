"""`AsyncLLM`: an engine on a thread of its own, for many callers at once."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from headrace.engine.schedule.sampling import SamplingParams
from headrace.errors import HeadraceError
from headrace.llm.frontend import Prompt, WeightSource
from headrace.llm.llm import LLM
from headrace.llm.loop import EngineLoop, EngineStoppedError
from headrace.llm.outputs import RequestOutput

__all__ = ["AsyncLLM", "EngineStoppedError"]

Deliver = Callable[[RequestOutput | BaseException], None]


class AsyncLLM:
    """The engine of `LLM` on one thread, the only one that runs kernels.

    >>> async with AsyncLLM("path") as llm:                                              # doctest: +SKIP
    ...     async for output in llm.stream("Once", SamplingParams(max_tokens=9)):
    ...         print(output.outputs[0].text)

    Leaving a stream early aborts its request: its blocks are free before the next step.
    """

    def __init__(self, model: str | Path | Callable[[], LLM], **options: Any) -> None:
        """`model` is a folder, a hub id, or a function that returns an `LLM` (called on the engine's thread)."""
        self._loop = EngineLoop()
        self._receivers: dict[str, Deliver] = {}
        self._stopped: BaseException | None = None
        ready: Future[LLM] = Future()
        make = model if callable(model) else lambda: LLM(model, **options)
        self._thread = threading.Thread(target=self._work, args=(make, ready), name="headrace-engine", daemon=True)
        self._thread.start()
        self._llm = ready.result()
        self.tokenizer = self._llm.tokenizer
        self.fingerprint = self._llm.fingerprint
        self.frontend = self._llm.frontend

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        """Outputs of one prompt as they grow; the last one is `finished`."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[RequestOutput | BaseException] = asyncio.Queue()
        name: Future[str] = Future()

        def deliver(item: RequestOutput | BaseException) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, item)

        chosen = params or SamplingParams(**self._llm.default_sampling_params())
        prepared = self.frontend.prepare(chosen)
        if prepared is not None:
            await asyncio.wrap_future(prepared)
        self._loop.post(lambda: self._add(name, deliver, prompt, chosen, request_id, priority))
        own = None
        try:
            own = await asyncio.wrap_future(name)
            while True:
                item = await arrived.get()
                if isinstance(item, BaseException):
                    raise EngineStoppedError("the engine stopped before this request was done") from item
                yield item
                if item.finished:
                    return
        finally:
            self._leave(name if own is None else own)

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> RequestOutput:
        """The finished output of one prompt."""
        async for output in self.stream(prompt, params, **options):
            last = output
        return last

    async def abort(self, request_id: str) -> None:
        """Abort a request: its stream gets one last output with finish_reason "abort"."""
        self._loop.post(lambda: self._abort(request_id))

    async def update_weights(self, source: WeightSource, version: int | None = None) -> int:
        """`LLM.update_weights`, between two steps: running requests continue under the new weights."""
        done: Future[int] = Future()
        self._loop.post(lambda: self._update(done, source, version))
        return await asyncio.wrap_future(done)

    def shutdown(self) -> None:
        """Stop the engine; requests that still run raise `EngineStoppedError`."""
        self._loop.stop()
        self._thread.join()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.shutdown)

    def _leave(self, name: str | Future[str]) -> None:
        """Abort a request whose caller left, also one that is not added yet."""
        if isinstance(name, str):
            self._abort_later(name)
        else:
            name.add_done_callback(lambda f: None if f.cancelled() or f.exception() else self._abort_later(f.result()))

    def _abort_later(self, name: str) -> None:
        with contextlib.suppress(EngineStoppedError):  # a stopped engine runs no request
            self._loop.post(lambda: self._abort(name))

    # The methods below run on the engine's thread.

    def _work(self, make: Callable[[], LLM], ready: Future[LLM]) -> None:
        try:
            llm = make()
        except BaseException as error:
            ready.set_exception(error)
            return
        self._llm = llm
        ready.set_result(llm)
        try:
            self._loop.run(lambda: llm.frontend.has_work, self._step)
            self._stopped = EngineStoppedError("the engine was shut down")
        except BaseException as error:
            self._stopped = error
        finally:
            for deliver in self._receivers.values():
                deliver(self._stopped or EngineStoppedError())
            self._loop.close(self._stopped)

    def _step(self) -> None:
        for group in self._llm.frontend.step():
            if group.name in self._receivers:
                self._receivers[group.name](group.output.snapshot())
                if group.output.finished:
                    del self._receivers[group.name]

    def _add(
        self,
        name: Future[str],
        deliver: Deliver,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None,
        priority: int,
    ) -> None:
        if not name.set_running_or_notify_cancel():
            return
        try:
            if self._stopped is not None:
                raise EngineStoppedError("the engine has stopped") from self._stopped
            added = self._llm.frontend.add(prompt, params, request_id, priority)
        except (HeadraceError, EngineStoppedError) as error:
            name.set_exception(error)
            return
        self._receivers[added] = deliver
        name.set_result(added)

    def _update(self, done: Future[int], source: WeightSource, version: int | None) -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            if self._stopped is not None:
                raise EngineStoppedError("the engine has stopped") from self._stopped
            done.set_result(self._llm.update_weights(source, version))
        except (HeadraceError, EngineStoppedError) as error:
            done.set_exception(error)
        except BaseException as error:
            done.set_exception(error)
            raise

    def _abort(self, name: str) -> None:
        deliver = self._receivers.pop(name, None)
        output = self._llm.frontend.abort(name)
        if output is not None and deliver is not None:
            deliver(output)
