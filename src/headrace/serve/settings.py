"""`ServeSettings`: the options of a server, beside the engine's."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass
from urllib.parse import urlsplit

from headrace.config import require
from headrace.dialects.choose import dialect_named

__all__ = ["ServeSettings"]

DEFAULT_PORTS = {"http": 80, "https": 443}
ORIGIN = "give * or scheme://host:port as browsers do, in lower case, without a path, a pattern or the default port"


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Validated once. The names are the flags of `headrace serve`."""

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: tuple[str, ...] = ()
    """Answers carry the first; empty means the model's path or hub id."""
    api_key: tuple[str, ...] = ()
    allow_remote: bool = False
    allowed_origins: tuple[str, ...] = ()
    """Origins of web pages that may use the server from a browser, or "*"; empty means none."""
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    """Whether browsers may send cookies, for a proxy in front that asks for them."""
    allow_weight_updates: bool = False
    tool_format: str | None = None
    """The dialect of tool calls; None: as the chat template writes them."""
    max_logprobs: int = 20
    max_body_mib: float = 8.0
    max_queue: int = 1024
    drain_timeout: float = 10.0
    restart: bool = True

    def __post_init__(self) -> None:
        if self.tool_format is not None:
            dialect_named(self.tool_format)
        require(0 <= self.port <= 65535, f"port={self.port} must be from 0 (any that is free) to 65535")
        require(0 < self.max_body_mib <= 1024, f"max_body_mib={self.max_body_mib:g} must be more than 0, at most 1024")
        require(0 <= self.drain_timeout < math.inf, f"drain_timeout={self.drain_timeout:g} must be a time in seconds")
        require(all(self.api_key) and all(self.served_model_name), "an API key or a model name is empty")
        require(all(key.isascii() for key in self.api_key), "an API key must be ASCII: headers carry nothing else")
        for origin in self.allowed_origins:
            require(origin == "*" or _is_origin(origin), f"allowed_origins: {origin!r} is not one: {ORIGIN}")
        require(
            not (self.allow_credentials and "*" in self.allowed_origins),
            "allow_credentials with allowed_origins=* lets every web page act as its visitors: name the origins",
        )
        require(
            bool(self.api_key) or self.allow_remote or _is_loopback(self.host),
            f"host={self.host} lets other machines in, and there is no key: set --api-key, or --allow-remote if "
            "every client that can reach it may use it",
        )


def _is_origin(text: str) -> bool:
    """Whether browsers send it so: a scheme, a host in lower case, and a port that is not the scheme's own."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    plain = parts.hostname and text == f"{parts.scheme}://{parts.netloc}" == text.lower() and not set("*@") & set(text)
    return bool(plain) and (port is None or port != DEFAULT_PORTS.get(parts.scheme))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
