"""`ResumeRecord`: a request with its output so far, from which another engine continues with equal tokens."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from headrace.cache.key import CacheKey
from headrace.engine.schedule.constraint import Constraint
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams
from headrace.errors import RequestError
from headrace.llm.outputs import CompletionOutput, Logprob, RequestOutput

__all__ = ["ResumeRecord"]

T = TypeVar("T")
TableRows = list[list[list[Any]] | None] | None


@dataclass(frozen=True, slots=True)
class ResumeRecord:
    """All that a token depends on. An engine of the same `fingerprint` and weights gives the same next token.

    `output` grows while the request runs; `snapshot` gives a record that does not. Raises `RequestError` where the
    seed or a choice is missing.
    """

    output: RequestOutput
    params: SamplingParams
    """With a seed."""
    priority: int
    cache_key: CacheKey
    """The caller's part; the engine that computes the request sets `weights_version`."""
    fingerprint: str

    def __post_init__(self) -> None:
        _require(self.params.seed is not None, "params has no seed")
        indices = [choice.index for choice in self.output.outputs]
        _require(indices == list(range(self.params.n)), f"n={self.params.n}, and the choices are {indices}")

    @classmethod
    def begin(
        cls,
        name: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        priority: int = 0,
        cache_key: CacheKey = CacheKey(),
        fingerprint: str = "",
    ) -> ResumeRecord:
        """Of a new request. Params without a seed get one, or no other engine could draw the same tokens."""
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(63))
        output = RequestOutput.begin(name, prompt, prompt_token_ids, params)
        return cls(output, params, priority, cache_key, fingerprint)

    def snapshot(self) -> ResumeRecord:
        """A copy that does not grow."""
        return replace(self, output=self.output.snapshot())

    def requests(self, request_ids: Sequence[int], weights_version: int) -> list[Request]:
        """The unfinished choices, to be added to an engine; `request_ids` has one id for each choice.

        A beam search has one request and begins again: it is deterministic, so the result is the same.
        """
        cache_key = self.cache_key._replace(weights_version=weights_version)
        assert self.params.seed is not None
        requests = [
            Request(
                request_id,
                self.output.prompt_token_ids,
                self.params,
                seed=self.params.seed,
                choice=choice.index,
                priority=self.priority,
                cache_key=cache_key,
                output_token_ids=choice.token_ids,
                num_scored=len(self.output.prompt_logprobs or (None,)) - 1,
            )
            for request_id, choice in zip(request_ids, self.output.outputs)
            if choice.finish_reason is None
        ]
        return requests[:1] if self.params.beam_width else requests

    def to_dict(self) -> dict[str, Any]:
        """Data for `json.dumps`; floats keep their bits."""
        data = asdict(self)
        data["params"]["logit_bias"] = [list(item) for item in self.params.logit_bias.items()]
        data["output"]["prompt_logprobs"] = _rows(self.output.prompt_logprobs)
        for plain, choice in zip(data["output"]["outputs"], self.output.outputs):
            plain["logprobs"] = _rows(choice.logprobs)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ResumeRecord:
        """The record of `to_dict`, also after JSON; `RequestError` names what is missing or wrong."""
        try:
            constraint = data["params"]["constraint"]
            params = {
                **data["params"],
                "logit_bias": dict(data["params"]["logit_bias"]),
                "constraint": None if constraint is None else _make(Constraint, constraint),
            }
            output = {**data["output"], "prompt_logprobs": _tables(data["output"]["prompt_logprobs"])}
            output["outputs"] = [
                _make(CompletionOutput, {**choice, "logprobs": _tables(choice["logprobs"])})
                for choice in output["outputs"]
            ]
            parts = {
                "output": _make(RequestOutput, output),
                "params": _make(SamplingParams, params),
                "cache_key": CacheKey(*data["cache_key"]),
            }
            record = _make(cls, {**data, **parts})
        except RequestError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RequestError(f"the resume record is broken: {error!r}") from error
        for ids in (record.output.prompt_token_ids, *(choice.token_ids for choice in record.output.outputs)):
            _require(isinstance(ids, list) and all(type(i) is int for i in ids), "token ids must be a list of integers")
        return record


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise RequestError(f"the resume record is broken: {what}")


def _make(kind: type[T], values: Mapping[str, Any]) -> T:
    """An instance of a dataclass from all of its fields."""
    names = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    for name in sorted(names ^ values.keys()):
        _require(False, f"{kind.__name__} {'needs' if name in names else 'has no field'} {name}")
    return kind(**values)


def _rows(tables: Sequence[Mapping[int, Logprob] | None] | None) -> TableRows:
    """Tables as rows of (token id, log-probability, rank, text): JSON has no integer keys."""
    if tables is None:
        return None
    return [None if table is None else [[token, *entry] for token, entry in table.items()] for table in tables]


def _tables(rows: TableRows) -> list[dict[int, Logprob] | None] | None:
    if rows is None:
        return None
    return [None if table is None else {token: Logprob(*entry) for token, *entry in table} for table in rows]
