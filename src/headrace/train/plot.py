"""The plot of the loss, drawn in a process of its own.

matplotlib calls OpenBLAS, which ends the process that it runs in when memory is short: a run must survive that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["draw"]

SIZE, DPI = (7.0, 4.0), 120


def draw(lines: list[dict[str, Any]], path: Path) -> str | None:
    """Plot the training loss and the held-out loss by step; returns why it failed, if it did.

    `lines`: those of metrics.jsonl.
    """
    curves = {key: [(line["step"], line[key]) for line in lines if key in line] for key in ("loss", "val_loss")}
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(path)],
        input=json.dumps(curves),
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    if not done.returncode:
        return None
    reason = done.stderr.strip().splitlines()
    return f"{path} could not be drawn: {reason[-1] if reason else f'exit status {done.returncode}'}"


def _main() -> None:
    from matplotlib.figure import Figure  # here, so that the training process does not import it

    curves = json.load(sys.stdin)
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*curves["loss"]), linewidth=0.8, label="training")
    if curves["val_loss"]:
        axes.plot(*zip(*curves["val_loss"]), "o-", label="held out")
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(sys.argv[1], dpi=DPI)


if __name__ == "__main__":
    _main()
