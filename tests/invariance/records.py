"""Records of requests that no `Frontend` holds."""

from dataclasses import replace

from headrace.engine.schedule.request import Request
from headrace.llm.records import ResumeRecord


def record_of(request: Request) -> ResumeRecord:
    """Of a request with one choice."""
    params = replace(request.params, seed=request.seed)
    record = ResumeRecord.begin("", None, request.prompt_token_ids, params, request.priority)
    record.output.outputs[0].token_ids = request.output_token_ids[: request.num_given]
    return record


def known_tokens(record: ResumeRecord) -> list[int]:
    """Prompt and output."""
    return [*record.output.prompt_token_ids, *record.output.outputs[0].token_ids]
