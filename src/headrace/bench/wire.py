"""A minimal HTTP/1.1 client that posts a request and reads the streamed answer, in microseconds per chunk.

The load generator may share its machine with the server, and a full client would take processor time from it. Each
request has its own connection, as those of many users do.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from urllib.parse import urlsplit

from headrace.errors import RequestError

__all__ = ["Endpoint", "Reply", "WireError", "post"]

HEAD_BYTES = 1 << 16


class WireError(Exception):
    """The answer is not HTTP, or ended early."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address of requests."""

    host: str
    port: int
    path: str
    tls: ssl.SSLContext | None = None
    key: str | None = None

    @classmethod
    def of(cls, url: str, path: str, key: str | None = None) -> Endpoint:
        """`path` of the server at `url`, which may end with /v1 or not."""
        wrong = RequestError(f"--url {url!r} is not an address such as http://127.0.0.1:8000")
        try:
            parts = urlsplit(url.rstrip("/").removesuffix("/v1"))
            port = parts.port
        except ValueError:
            raise wrong from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise wrong
        if key is not None and (not key.isascii() or not key.isprintable()):
            raise RequestError("the API key must be printable ASCII: other characters are not allowed in a header")
        secure = parts.scheme == "https"
        tls = ssl.create_default_context() if secure else None
        return cls(parts.hostname, port or (443 if secure else 80), parts.path + path, tls, key)

    def head(self, length: int) -> bytes:
        """A POST's first lines, for a JSON body of `length` bytes."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        key = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        return (
            f"POST {self.path} HTTP/1.1\r\nHost: {name}:{self.port}\r\nContent-Type: application/json\r\n"
            f"Accept: text/event-stream\r\nConnection: close\r\n{key}Content-Length: {length}\r\n\r\n"
        ).encode()


class Reply:
    """A status, and the body as a stream."""

    def __init__(self, reader: asyncio.StreamReader, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self._reader = reader
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        length = headers.get("content-length", "")
        self._length = int(length) if length.isdigit() else None

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body. Raises `WireError` where it ends early."""
        if self._chunked:
            while size := await self._chunk_size():
                piece = await _exactly(self._reader, size + 2)
                yield piece[:-2]
            return
        left = self._length
        while left is None or left > 0:
            piece = await self._reader.read(HEAD_BYTES if left is None else min(left, HEAD_BYTES))
            if not piece:
                if left is not None:
                    raise WireError("the connection ended before the body did")
                return
            left = None if left is None else left - len(piece)
            yield piece

    async def _chunk_size(self) -> int:
        line = await self._reader.readline()
        try:
            return int(line.split(b";")[0], 16)
        except ValueError:
            raise WireError("the connection ended before the body did" if not line else "a chunk has no size") from None


async def _exactly(reader: asyncio.StreamReader, count: int) -> bytes:
    try:
        return await reader.readexactly(count)
    except asyncio.IncompleteReadError:
        raise WireError("the connection ended before the body did") from None


async def post(endpoint: Endpoint, body: bytes) -> tuple[Reply, asyncio.StreamWriter]:
    """The reply's head, and the connection, which the caller closes. Raises OSError and `WireError`."""
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port, ssl=endpoint.tls, limit=HEAD_BYTES)
    try:
        writer.write(endpoint.head(len(body)) + body)
        return await _reply(reader), writer
    except BaseException:
        writer.close()
        raise


async def _reply(reader: asyncio.StreamReader) -> Reply:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        raise WireError("no HTTP answer came") from None
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ", 2)
    if not words[0].startswith("HTTP/1.") or len(words) < 2 or not words[1].isdigit():
        raise WireError(f"the answer is not HTTP: {first[:60]!r}")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Reply(reader, int(words[1]), headers)
