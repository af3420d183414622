"""Outputs as plain JSON-able data and back, to the bit: half of a resume record; `Request` makes the other half."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from headrace.llm.outputs import CompletionOutput, Logprob, RequestOutput

__all__ = ["plain_output", "plain_prompt_logprobs", "plain_table", "read_output", "read_table"]


def plain_table(table: Mapping[int, Logprob]) -> list[list[Any]]:
    """Rows of (token id, log-probability, rank, text), in the table's order."""
    return [[token, entry.logprob, entry.rank, entry.decoded_token] for token, entry in table.items()]


def read_table(rows: Sequence[Sequence[Any]]) -> dict[int, Logprob]:
    """The table of `plain_table`."""
    return {int(token): Logprob(*rest) for token, *rest in rows}


def plain_prompt_logprobs(output: RequestOutput) -> list[list[list[Any]] | None] | None:
    """A table for each prompt token that has been scored; None where none were asked for."""
    if output.prompt_logprobs is None:
        return None
    return [None if table is None else plain_table(table) for table in output.prompt_logprobs]


def plain_output(output: CompletionOutput) -> dict[str, Any]:
    """One choice, with its tables as rows."""
    plain = {f.name: getattr(output, f.name) for f in fields(output)}
    return {
        **plain,
        "logprobs": output.logprobs and [plain_table(t) for t in output.logprobs],
        "token_ids": list(output.token_ids),
    }


def read_output(data: Mapping[str, Any]) -> CompletionOutput:
    """The choice of `plain_output`; TypeError if it is none."""
    output = CompletionOutput(**data)
    if output.logprobs is not None:
        output.logprobs = [read_table(rows) for rows in data["logprobs"]]
    return output
