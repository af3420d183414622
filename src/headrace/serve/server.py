"""`Server`: a bound socket, a gateway and the application, from start to shutdown.

bind ──> start the engine ──> ready ──> (SIGTERM: drain) ──> (again: stop) ──> closed
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from headrace.errors import ConfigError
from headrace.instance.wire import Ready
from headrace.serve.app import create_app
from headrace.serve.gateway import Gateway
from headrace.serve.metrics import ServerMetrics
from headrace.serve.models import ModelDirectory, ServedModel
from headrace.serve.settings import ServeSettings
from headrace.serve.text_service import TextService
from headrace.serve.trials import ConstraintTrials
from headrace.text.tokenizer import Tokenizer

__all__ = ["Server"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)
HEAD_SECONDS = 15.0
"""Time limit for receiving a request's head; then the connection is closed."""
KEEP_ALIVE_SECONDS = 75
BACKLOG = 2048
ProgressCallback = Callable[[int, int, str], None]


class _Protocol(H11Protocol):
    """uvicorn's, with a time limit for request heads."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.trailing_data[0]:  # a part of the next head came while this answer was made
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def _watch_head(self) -> None:
        """Start the timer while the next request's head is awaited; stop it when the head is complete."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _unwatch(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers, and with a callback when it listens."""

    def __init__(self, config: uvicorn.Config, listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._listening = listening

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening()


class Server:
    """One model served over HTTP, in this thread's event loop."""

    gateway: Gateway

    def __init__(self, model: str, options: dict[str, Any], settings: ServeSettings) -> None:
        """Binds the port. `options` are fields of `EngineOptions`; raises `ConfigError` if they cannot work."""
        self._model = model
        self._options = options
        self._settings = settings
        self._names = settings.served_model_name or (model,)
        self._metrics = ServerMetrics(self._names[0])
        self.gateway = Gateway(
            model,
            options,
            max_queue=settings.max_queue,
            restart=settings.restart,
            max_logprobs=settings.max_logprobs,
            observer=self._metrics,
            progress=self._report_progress,
        )
        self._progress: ProgressCallback | None = None
        self._http: _Uvicorn | None = None
        self._interrupt: Callable[[], object] = lambda: None
        """The current action for a signal."""
        self._ends = 0
        """Shutdown signals so far."""
        self._ending: list[asyncio.Task[None]] = []
        self._socket = _bind(settings.host, settings.port)

    @property
    def url(self) -> str:
        """The address it listens on."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def model_name(self) -> str:
        """The name that answers carry."""
        return self._names[0]

    async def run(
        self,
        ready: Callable[[Ready], None],
        progress: ProgressCallback | None = None,
        until: asyncio.Event | None = None,
    ) -> None:
        """Serve until a SIGTERM or SIGINT, or until `until` is set; then let running requests finish.

        `ready` is called when requests can be served; `progress(done, total, kernel)` while kernels compile. Raises
        `HeadraceError` for a bad model or option, KeyboardInterrupt for a signal before the server is ready.
        """
        self._progress = progress
        loop = asyncio.get_running_loop()
        before = {n: signal.signal(n, lambda *_: loop.call_soon_threadsafe(lambda: self._interrupt())) for n in SIGNALS}
        text: TextService | None = None
        trials: ConstraintTrials | None = None
        try:
            text = await self._start()
            info = self.gateway.info
            trials = ConstraintTrials(info.folder, info.vocab_size)
            self._interrupt = self._end
            if until is not None:
                self._ending.append(asyncio.ensure_future(self._end_after(until)))
            await self._serve(text, trials, lambda: ready(self.gateway.info))
        finally:
            await self.gateway.stop()
            for task in self._ending:
                task.cancel()
            await asyncio.gather(*self._ending, return_exceptions=True)
            for part in (text, trials):
                if part is not None:
                    await part.close()
            self._socket.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    async def _start(self) -> TextService:
        """Start the engine, then load its tokenizer."""
        starting = asyncio.ensure_future(self.gateway.start())
        interrupted = asyncio.Event()
        self._interrupt = interrupted.set
        waiting = asyncio.ensure_future(interrupted.wait())
        try:
            await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                raise KeyboardInterrupt
            starting.result()
        finally:
            for task in (starting, waiting):
                task.cancel()
            await asyncio.gather(starting, waiting, return_exceptions=True)
        text = TextService(await asyncio.to_thread(Tokenizer.from_folder, self.gateway.info.folder))
        await text.start()
        return text

    async def _serve(self, text: TextService, trials: ConstraintTrials, ready: Callable[[], None]) -> None:
        settings = self._settings
        model = ServedModel(
            self.gateway,
            text,
            trials,
            self._names,
            defaults=self.gateway.info.default_sampling_params,
            priorities=self._options.get("scheduling_policy") == "priority",
            tool_format=settings.tool_format,
        )
        config = uvicorn.Config(
            create_app(ModelDirectory(model), self._metrics, settings),
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            backlog=BACKLOG,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        self._http = _Uvicorn(config, ready)
        await self._http.serve([self._socket])

    def _end(self) -> None:
        """A shutdown signal: the first lets running requests finish, the second stops them."""
        self._ends += 1
        timeout = self._settings.drain_timeout if self._ends == 1 else 0.0
        self._ending.append(asyncio.ensure_future(self._drain(timeout)))

    async def _end_after(self, until: asyncio.Event) -> None:
        await until.wait()
        await self._drain(self._settings.drain_timeout)

    async def _drain(self, timeout: float) -> None:
        await self.gateway.drain(timeout)
        if self._http is not None:
            self._http.should_exit = True

    def _report_progress(self, done: int, total: int, kernel: str) -> None:
        if self._progress is not None:
            self._progress(done, total, kernel)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}: choose another --host or --port") from None
    return bound
