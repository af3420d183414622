"""`GatewayObserver`: callbacks for whatever counts what a gateway does."""

from __future__ import annotations

from typing import Protocol

from headrace.engine.schedule.sampling import SamplingParams
from headrace.instance.wire import Explanation, Ready, StepReport
from headrace.llm.outputs import RequestOutput

__all__ = ["GatewayObserver"]


class GatewayObserver(Protocol):
    """Called on the event loop: it must be quick. `instance` is the name of the one that runs the request. Seconds."""

    def ready(self, info: Ready) -> None:
        """An instance can take requests, for the first time."""

    def arrived(self, instance: str, name: str, prompt_tokens: int) -> None:
        """A request came; it may still be refused."""

    def first_token(self, instance: str, name: str, seconds: float) -> None:
        """The first token came, `seconds` after the request."""

    def token_gap(self, instance: str, name: str, seconds: float) -> None:
        """A further token came, `seconds` after the one before."""

    def finished(
        self,
        instance: str,
        name: str,
        reason: str,
        params: SamplingParams,
        output: RequestOutput,
        explanation: Explanation | None,
        seconds: float,
    ) -> None:
        """A request ended: "stop" or "length", or without an explanation "abort", "error" or "refused"."""

    def called(self, instance: str, calls: int) -> None:
        """An answer of one choice called tools, so many times."""

    def stepped(self, report: StepReport) -> None:
        """An engine did a step."""

    def restarted(self, instance: str) -> None:
        """A new process has replaced one that died."""
