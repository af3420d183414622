"""The optional packages: which extra of headrace brings the packages that a command needs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from headrace.errors import ConfigError

__all__ = ["EXTRAS", "require_extra"]

EXTRAS: Mapping[str, Mapping[str, str]] = {
    "serve": {
        "fastapi": "fastapi",
        "uvicorn": "uvicorn",
        "pydantic": "pydantic",
        "msgspec": "msgspec",
        "zmq": "pyzmq",
        "httpx": "httpx",
        "prometheus_client": "prometheus-client",
    },
    "train": {"matplotlib": "matplotlib", "tensorboardX": "tensorboardX"},
    "reproduce": {"matplotlib": "matplotlib"},
}
"""{extra: {module: package}}, as in pyproject.toml."""


def require_extra(command: str, extra: str) -> None:
    """Raise `ConfigError` that names the first package of an extra which is not installed."""
    for module, package in EXTRAS[extra].items():
        if find_spec(module) is None:
            raise ConfigError(f'headrace {command} needs {package}: pip install "headrace[{extra}]"')
