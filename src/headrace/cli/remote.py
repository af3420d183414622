"""`Remote`: a client of an OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from headrace.errors import RequestError

__all__ = ["Remote"]

CONNECT_SECONDS = 5.0


class Remote:
    """One server. Every method raises `RequestError` where the server cannot be reached or answers an error."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """`url` may end with /v1 or not."""
        base = url.rstrip("/").removesuffix("/v1")
        if not base.startswith(("http://", "https://")):
            raise RequestError(f"--url {url!r} is not an address such as http://127.0.0.1:8000")
        self._url = base
        self._client = httpx.Client(
            base_url=base,
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )

    def first_model(self) -> str:
        """The name of the server's first model."""
        with self._ask("GET", "/v1/models") as response:
            models = json.loads(response.read()).get("data") or []
        if not models:
            raise RequestError(f"{self._url} serves no model")
        return str(models[0]["id"])

    def complete(self, model: str, prompt: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """One completion, without streaming."""
        with self._ask("POST", "/v1/completions", {"model": model, "prompt": prompt, **fields}) as response:
            answer: dict[str, Any] = json.loads(response.read())
        return answer

    def message(self, model: str, messages: list[dict[str, Any]], fields: Mapping[str, Any]) -> dict[str, Any]:
        """The assistant's message that answers a conversation, without streaming."""
        with self._ask("POST", "/v1/chat/completions", {"model": model, "messages": messages, **fields}) as response:
            answer: dict[str, Any] = json.loads(response.read())["choices"][0]["message"]
        return answer

    def chat(self, model: str, messages: list[dict[str, str]], fields: Mapping[str, Any]) -> Iterator[str]:
        """The pieces of a streamed reply."""
        body = {"model": model, "messages": messages, "stream": True, **fields}
        with self._ask("POST", "/v1/chat/completions", body) as response:
            for event in self._events(response):
                for choice in event.get("choices") or []:
                    yield choice["delta"].get("content") or ""

    def _events(self, response: httpx.Response) -> Iterator[dict[str, Any]]:
        rest = b""
        try:
            for data in response.iter_bytes():
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if line.strip() == b"data: [DONE]":
                        return
                    if line.startswith(b"data: "):
                        event = json.loads(line.removeprefix(b"data: "))
                        if "error" in event:
                            raise RequestError(f"the server broke off: {event['error'].get('message')}")
                        yield event
        except httpx.HTTPError as error:
            raise RequestError(f"the connection to {self._url} broke: {error}") from None
        raise RequestError(f"the connection to {self._url} ended before the reply did")

    @contextlib.contextmanager
    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Iterator[httpx.Response]:
        """An open response, to be read within the context."""
        try:
            response = self._client.send(self._client.build_request(method, path, json=body), stream=True)
        except httpx.HTTPError as error:
            raise RequestError(f"{self._url} cannot be reached: {error}") from None
        try:
            if not response.is_success:
                raise RequestError(f"{self._url} refuses: {_message(response)}")
            yield response
        finally:
            response.close()


def _message(response: httpx.Response) -> str:
    try:
        return str(json.loads(response.read())["error"]["message"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return f"it answered {response.status_code}"
