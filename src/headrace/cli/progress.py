"""Loading an engine with a line that says what takes time."""

from __future__ import annotations

from typing import Any

__all__ = ["load"]


def load(model: str, options: dict[str, Any]) -> Any:
    """An `LLM`; kernels that must be compiled first show a progress line on standard error."""
    from headrace.engine.options import EngineOptions

    EngineOptions(**options)
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("loading the model …") as status:
        from headrace.engine.llm import LLM

        def progress(done: int, total: int, name: str) -> None:
            status.update(f"compiling kernels for this machine, once: {done}/{total} {name}")

        return LLM(model, progress=progress, **options)
