"""Load models and kernels under a status line."""

from __future__ import annotations

import os
import sys
from typing import Any

__all__ = ["compiling", "kernels", "load", "status", "warn"]


def status(text: str) -> Any:
    """A status line on standard error; `stop` removes it."""
    from rich.console import Console

    return Console(stderr=True).status(text)


def compiling(status: Any) -> Any:
    """A `progress` callback that shows on a status line which kernel is being compiled."""

    def progress(done: int, total: int, name: str) -> None:
        status.update(f"compiling kernels for this machine, once: {done}/{total} {name}")

    return progress


def load(model: str, options: dict[str, Any]) -> Any:
    """An `LLM`; a status line on standard error shows the compilation of kernels."""
    from headrace.llm.options import EngineOptions
    from headrace.model.folder import check_folder

    EngineOptions(**options)
    check_folder(model)
    with status("loading the model …") as line:
        from headrace.llm.llm import LLM

        return LLM(model, progress=compiling(line), **options)


def kernels(name: str, ranks: int = 1, device: Any = None) -> Any:
    """The op set `name`, compiled, on `device`, with this rank's share of the threads of a machine with `ranks`."""
    with status("loading kernels …") as line:
        from headrace.kernels.load import load_ops

        own: dict[str, Any] = {"threads": max(1, (os.cpu_count() or 1) // ranks)} if ranks > 1 else {}
        ops = load_ops(name, alone=ranks == 1, **(own if name == "cpu" else {"device": device} if device else {}))
        ops.warm_up(progress=compiling(line))
        return ops


def warn(message: str) -> None:
    """Print a warning on standard error."""
    print(f"headrace: warning: {message}", file=sys.stderr)
