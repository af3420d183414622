"""`GatewayObserver`: what a gateway tells whoever counts."""

from __future__ import annotations

from typing import Protocol

from headrace.instance.wire import Explanation, StepReport
from headrace.llm.outputs import RequestOutput

__all__ = ["GatewayObserver"]


class GatewayObserver(Protocol):
    """Told what happens, on the event loop: it must be quick. Seconds."""

    def arrived(self, name: str, prompt_tokens: int) -> None:
        """A request was taken in; it may be refused still."""

    def first_token(self, name: str, seconds: float) -> None:
        """The first token came, so long after the request."""

    def token_gap(self, name: str, seconds: float) -> None:
        """The next token came, so long after the one before."""

    def finished(
        self, name: str, reason: str, output: RequestOutput, explanation: Explanation | None, seconds: float
    ) -> None:
        """It is over: "stop", "length", "abort" (no explanation), "error" (the same) or "refused" (the same)."""

    def stepped(self, report: StepReport) -> None:
        """The engine did a step."""

    def restarted(self) -> None:
        """A new instance has taken over."""
