"""`GrammarTrial`: compiles a user's grammar in a process that can be killed, before an engine compiles it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from headrace.engine.schedule.constraint import Constraint
from headrace.engine.schedule.sampling import SamplingParams
from headrace.errors import RequestError
from headrace.grammar.grammars import Grammars
from headrace.text.line_process import LineProcess, serve_lines
from headrace.text.tokenizer import Tokenizer

__all__ = ["SECONDS", "GrammarTrial", "serve_trials"]

SECONDS = 2.0
"""Time limit of compiling a grammar and filling its first two masks. A usual one takes some milliseconds."""


class GrammarTrial:
    """One process, started on first use, that tries one request's grammars at a time, for one thread at a time."""

    def __init__(self, folder: str, vocab_size: int, seconds: float = SECONDS) -> None:
        """Of a model's folder, whose tokenizer it loads, and the rows of its vocabulary."""
        self._seconds = seconds
        self._process = LineProcess("grammars", __name__, "serve_trials", seconds, (str(folder), str(vocab_size)))

    def check(self, params: SamplingParams) -> None:
        """Raise `RequestError` for a wrong grammar or one over a limit; `ChildProcessError` if no process starts."""
        field = "bad_words" if params.constraint is None else "constraint"
        job = {
            "constraint": None if params.constraint is None else asdict(params.constraint),
            "bad_words": params.bad_words,
        }
        try:
            fault = self._process.run(json.dumps(job).encode())
        except TimeoutError:
            reason = f"{{{field}}} takes longer than {{}} s to compile: make it smaller"
            raise RequestError.about(field, reason, f"{self._seconds:g}") from None
        except BrokenPipeError:
            reason = f"{{{field}}} takes more than 1 GiB to compile: make it smaller"
            raise RequestError.about(field, reason) from None
        if fault:
            raise RequestError.about(fault["param"], fault["template"], *fault["values"])

    def close(self) -> None:
        """End the process; a later call starts another."""
        self._process.close()

    @property
    def pid(self) -> int | None:
        """The process's id, if it runs."""
        return self._process.pid


def serve_trials(folder: str, vocab_size: str) -> None:
    """The process's main. A job has `constraint` (the fields of one, or null) and `bad_words`."""
    tokenizer = Tokenizer.from_folder(folder)
    grammars = Grammars(tokenizer, int(vocab_size))
    words_W = np.zeros(-(-int(vocab_size) // 32), np.uint32)
    grammars.warm_up()

    def answer(job: Mapping[str, Any]) -> Mapping[str, Any]:
        constraint = None if job["constraint"] is None else Constraint(**job["constraint"])
        try:
            params = SamplingParams(constraint=constraint, bad_words=tuple(job["bad_words"]))
            _try(grammars, params, tokenizer.eos_token_id, words_W)
        except RequestError as error:
            # A message that names no field has no template.
            template = error.template or "{" + str(error.param) + "}: " + str(error)
            return {"param": error.param, "template": template, "values": error.values}
        except MemoryError:
            os._exit(1)
        except Exception as error:
            field = "bad_words" if constraint is None else "constraint"
            return {"param": field, "template": f"{{{field}}} cannot be compiled: {{}}", "values": [repr(error)[:300]]}
        return {}

    serve_lines(answer)


def _try(grammars: Grammars, params: SamplingParams, eos: int | None, words_W: np.ndarray) -> None:
    """Compile, and fill the first two masks, unless the text ends before."""
    mask = grammars.mask(params, () if eos is None else (eos,))
    for _ in range(2):
        if mask.failed is not None or mask.ended:
            break
        mask.fill(words_W)
        allowed = np.flatnonzero(np.unpackbits(words_W.view(np.uint8), bitorder="little")).tolist()
        further = [token for token in allowed if token != eos][:1]
        if mask.failed is not None or not further:
            break
        mask.accept(mask.forced() or further)
    if mask.failed is not None:
        names, _, reason = mask.failed.partition(": ")
        fields = names.split(", ")
        listed = ", ".join(f"{{{field}}}" for field in fields)
        raise RequestError.about(fields[0], f"{listed} cannot be honoured: {{}}", reason)
