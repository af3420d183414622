"""The summary of a run of the load generator. Latencies exclude failed requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from headrace.bench.serving import RequestRow

__all__ = ["goodput", "row_json", "spread", "summarise", "summary_text"]

LATENCIES = {"ttft_ms": "first token", "gap_ms": "between tokens", "tpot_ms": "a token, mean", "latency_ms": "whole"}


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean, p50, p90, p99 (interpolated linearly) and max of the values that are not None; None without any."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    p50, p90, p99 = (float(p) for p in np.percentile(known, (50, 90, 99)))
    return {"mean": float(np.mean(known)), "p50": p50, "p90": p90, "p99": p99, "max": max(known)}


def goodput(
    rows: Sequence[RequestRow], seconds: float, slo_ttft: float | None, slo_tpot: float | None
) -> dict[str, float] | None:
    """Answers within both limits (ms): their number, rate and share of all requests. None without a limit."""
    if slo_ttft is None and slo_tpot is None:
        return None
    good = sum(
        row.failure is None
        and (slo_ttft is None or (row.ttft is not None and row.ttft * 1e3 <= slo_ttft))
        and (slo_tpot is None or row.tpot is None or row.tpot * 1e3 <= slo_tpot)
        for row in rows
    )
    return {
        "requests": good,
        "requests_per_second": good / seconds if seconds else 0.0,
        "share": good / len(rows) if rows else 0.0,
    }


def summarise(
    rows: Sequence[RequestRow], slo_ttft: float | None = None, slo_tpot: float | None = None
) -> dict[str, Any]:
    """Figures of a run. It lasts from its start to the last end, failures included."""
    whole = [row for row in rows if row.failure is None]
    seconds = max((row.end for row in rows if row.end is not None), default=0.0)
    late = [row.sent - row.scheduled for row in rows if row.sent is not None]
    reasons: dict[str, str] = {}
    for row in rows:
        if row.failure is not None:
            reasons.setdefault(row.failure, row.message)

    def ms(values: Iterable[float | None]) -> dict[str, float] | None:
        return spread(None if v is None else v * 1e3 for v in values)

    return {
        "requests": len(rows),
        "completed": len(whole),
        "failed": len(rows) - len(whole),
        "failures": dict(Counter(row.failure for row in rows if row.failure is not None)),
        "first_reasons": reasons,
        "short": sum(row.output_tokens < row.max_tokens for row in whole),
        "seconds": seconds,
        "ttft_ms": ms(row.ttft for row in whole),
        "gap_ms": ms(gap for row in whole for gap in row.gaps),
        "tpot_ms": ms(row.tpot for row in whole),
        "latency_ms": ms(row.latency for row in whole),
        "requests_per_second": len(whole) / seconds if seconds else 0.0,
        "output_tokens_per_second": sum(row.output_tokens for row in whole) / seconds if seconds else 0.0,
        "prompt_tokens_per_second": sum(row.prompt_tokens for row in whole) / seconds if seconds else 0.0,
        "goodput": goodput(rows, seconds, slo_ttft, slo_tpot),
        "client_late_ms": ms(late),
    }


def summary_text(summary: dict[str, Any]) -> str:
    """The summary as text for a terminal."""
    lines = [
        f"{summary['completed']} of {summary['requests']} requests answered in {summary['seconds']:.1f} s",
        f"{'ms':16}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}",
    ]
    for name, label in LATENCIES.items():
        figures = summary[name]
        cells = [f"{figures[k]:10.1f}" for k in ("mean", "p50", "p90", "p99", "max")] if figures else [f"{'–':>10}"] * 5
        lines.append(f"{label:16}" + "".join(cells))
    lines.append(
        f"throughput: {summary['requests_per_second']:.2f} requests/s · "
        f"{summary['output_tokens_per_second']:.1f} output tokens/s · "
        f"{summary['prompt_tokens_per_second']:.1f} prompt tokens/s"
    )
    if good := summary["goodput"]:
        lines.append(
            f"goodput: {good['requests_per_second']:.2f} requests/s within the limits, {good['share']:.1%} of all"
        )
    for kind, count in summary["failures"].items():
        lines.append(f"failed: {count} × {kind}: {summary['first_reasons'][kind] or 'unfinished at the end'}")
    if summary["short"]:
        lines.append(f"short: {summary['short']} answers ended before their length")
    if late := summary["client_late_ms"]:
        lines.append(f"the generator itself: at most {late['max']:.1f} ms late, p99 {late['p99']:.1f} ms")
    return "\n".join(lines)


def row_json(row: RequestRow) -> dict[str, Any]:
    """A row for a file, times to the microsecond."""
    plain = asdict(row)
    for name in ("scheduled", "sent", "end"):
        plain[name] = None if plain[name] is None else round(plain[name], 6)
    plain["tokens_at"] = [round(t, 6) for t in row.tokens_at]
    return plain
