"""Errors of requests: refused, not found, not allowed, queue full, or no engine available."""

from __future__ import annotations

from headrace.engine.schedule.sampling import named_parameter
from headrace.errors import RequestError

__all__ = ["NotAllowedError", "NotFoundError", "QueueFullError", "RefusedError", "UnavailableError", "named"]


class QueueFullError(RuntimeError):
    """The queue is full. `retry_after` estimates when a place will be free: whole seconds, from 1."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} sequences wait already, which is all the queue holds: try again later")
        self.retry_after = retry_after


class RefusedError(RequestError):
    """The request can never be served; `param` is the first field that the message names, if any."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class NotFoundError(RefusedError):
    """The request names a model that is not served here."""


class NotAllowedError(RefusedError):
    """The server was not started with the flag that allows this."""


class UnavailableError(RuntimeError):
    """No engine can serve this: it failed, or the server is stopping."""


def named(error: Exception) -> RefusedError:
    """A lower room's error as a `RefusedError`, with the field that its message names."""
    return error if isinstance(error, RefusedError) else RefusedError(str(error), named_parameter(str(error)))
