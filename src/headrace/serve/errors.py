"""What the gateway raises when a request is not at fault."""

__all__ = ["QueueFullError", "UnavailableError"]


class QueueFullError(RuntimeError):
    """Too many requests wait already. `retry_after` is when a seat may be free: whole seconds, from 1."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} sequences wait already, which is all the queue holds: try again later")
        self.retry_after = retry_after


class UnavailableError(RuntimeError):
    """No engine will serve this: it failed, or the server stops."""
