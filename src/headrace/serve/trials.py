"""`ConstraintTrials`: tries each new constraint in a process that can be killed, before the engine compiles it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from headrace.engine.schedule.constraint import Constraint
from headrace.engine.schedule.sampling import SamplingParams
from headrace.grammar.trial import GrammarTrial
from headrace.serve.errors import UnavailableError

__all__ = ["ConstraintTrials"]

MOST = 1024
"""Constraints that are known to compile, at most: those asked for last."""


class ConstraintTrials:
    """One thread and its process, in which constraints wait for their turn. Must be closed."""

    def __init__(self, folder: str, vocab_size: int) -> None:
        """Of the model in a folder, whose vocabulary has so many rows."""
        self._trial = GrammarTrial(folder, vocab_size)
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._good: OrderedDict[tuple[Constraint | None, tuple[str, ...]], None] = OrderedDict()

    async def check(self, params: SamplingParams) -> None:
        """Raise `RequestError` where a request's constraint is wrong, or takes too much time or memory.

        If the caller is cancelled, a trial that has begun still runs to its end or limit.
        """
        if not params.masked:
            return
        key = params.constraint, params.bad_words
        if key not in self._good:
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._trial.check, params)
            except ChildProcessError as error:
                raise UnavailableError(str(error)) from None
            self._good[key] = None
        self._good.move_to_end(key)
        while len(self._good) > MOST:
            self._good.popitem(last=False)

    async def close(self) -> None:
        """End the process."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._trial.close)
        self._thread.shutdown(wait=False)

    @property
    def pid(self) -> int | None:
        """The process's id, if it runs."""
        return self._trial.pid
