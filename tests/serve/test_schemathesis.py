"""The OpenAPI document is correct: valid requests get documented answers, and never a 5xx."""

import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, StopReason, events, from_schema

from headrace.serve.protocol.fields import CHAT, COMPLETIONS, TABLE, UPDATE
from serve.http_kit import served

CONFIG = {
    "seed": 20,
    "workers": 1,
    "request-timeout": 60,
    "cache": {"enabled": False},
    "generation": {"max-examples": 50, "deterministic": True, "no-shrink": True, "database": "none"},
    # No answer of one operation leads to another.
    "phases": {"stateful": {"enabled": False}},
    # Much that is well-formed cannot be honoured: the document knows no rules between fields.
    "checks": {"positive_data_acceptance": {"enabled": False}},
}
MOST_TOKENS = 8
OPERATIONS = 12
UNLIKELY = {field.name for field in TABLE if field.handling == "refused"} | {
    "reasoning_effort",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "priority",
    "stream_options",
    "length_penalty",
    "use_beam_search",
    "logit_bias",
    "allowed_token_ids",
    "min_tokens",
    "top_logprobs",
    "truncate_prompt_tokens",
    "truncation_side",
}
"""Fields that are refused, need others beside them, or are mostly drawn beyond their limit."""


@pytest.fixture(scope="module")
def server(tinyworld_checkpoint):
    """One of its own, whose weights may be changed."""
    with served(tinyworld_checkpoint, "--served-model-name", "tiny", "--allow-weight-updates") as running:
        yield running


def document(server):
    return server.client.get("/openapi.json").json()


@schemathesis.hook("before_call")
def bounded(context, case, kwargs):
    """Few tokens of the one model; and what is well-formed is, three times of four, helped to what can be honoured."""
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = "tiny"
    if case.path in (COMPLETIONS, CHAT):
        for name in ("max_tokens", "max_completion_tokens"):
            if type(body.get(name)) is int:
                body[name] = min(body[name], MOST_TOKENS)
    if case.meta.generation.mode == schemathesis.GenerationMode.POSITIVE and len(str(body)) % 4:
        for name in UNLIKELY & set(body):
            del body[name]
        if body.get("messages"):
            body["messages"] = [{"role": "user", "content": str(body["messages"])}]


def test_answers_are_as_documented(server, tinyworld_checkpoint):
    api = schemathesis.openapi.from_dict(document(server), config=SchemathesisConfig.from_dict(CONFIG))
    api.config.update(base_url=server.url)

    @api.hook("map_body")
    def there(context, body):
        """Every other folder is there."""
        if context.operation.path == UPDATE and isinstance(body, dict) and "path" in body and len(str(body)) % 2:
            return {**body, "path": str(tinyworld_checkpoint)}
        return body

    wrong: list[str] = []
    statuses: dict[str, set[int]] = {}
    ended = None
    for event in from_schema(api).execute():
        assert not isinstance(event, events.FatalError | events.NonFatalError), event
        if isinstance(event, events.ScenarioFinished | events.FuzzScenarioFinished):
            for checks in event.recorder.checks.values():
                wrong += [f"{event.recorder.label}: {c.failure_info}" for c in checks if c.status == Status.FAILURE]
            for interaction in event.recorder.interactions.values():
                assert interaction.response is not None
                statuses.setdefault(event.recorder.label, set()).add(interaction.response.status_code)
        if isinstance(event, events.EngineFinished):
            ended = event.stop_reason
    assert not wrong, "\n".join(wrong[:5])
    assert ended == StopReason.COMPLETED
    # What is drawn depends on every module that happens to be loaded: one operation may never draw a good body.
    unlucky = [label for label, seen in statuses.items() if 200 not in seen]
    assert len(statuses) == OPERATIONS and len(unlucky) <= 1, unlucky
    assert server.client.get("/health").json() == {"status": "ready", "restarts": 0}


def test_the_document_lists_the_statuses_that_occur(server):
    operations = [o for path in document(server)["paths"].values() for o in path.values()]
    assert len(operations) == OPERATIONS
    for operation in operations:
        answers = operation["responses"]
        assert {"200", "408", "413", "415", "500", "503"} <= set(answers) and "422" not in answers
        assert all("schema" in content for answer in answers.values() for content in answer["content"].values())
