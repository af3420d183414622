"""Loading with a line that says what takes time."""

from __future__ import annotations

from typing import Any

__all__ = ["kernels", "load"]


def _status(text: str) -> Any:
    from rich.console import Console

    return Console(stderr=True).status(text)


def _compiling(status: Any) -> Any:
    def progress(done: int, total: int, name: str) -> None:
        status.update(f"compiling kernels for this machine, once: {done}/{total} {name}")

    return progress


def load(model: str, options: dict[str, Any]) -> Any:
    """An `LLM`; kernels that must be compiled first show a progress line on standard error."""
    from headrace.engine.options import EngineOptions

    EngineOptions(**options)
    with _status("loading the model …") as status:
        from headrace.engine.llm import LLM

        return LLM(model, progress=_compiling(status), **options)


def kernels(name: str) -> Any:
    """The op set called `name`, compiled."""
    with _status("loading kernels …") as status:
        from headrace.kernels.ops import load_ops

        ops = load_ops(name)
        ops.warm_up(progress=_compiling(status))
        return ops
