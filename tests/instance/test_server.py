"""`Instance`: an engine that executes commands, without its process."""

from dataclasses import replace
from typing import Any

import pytest

from headrace import LLM, SamplingParams
from headrace.instance.server import Instance
from headrace.instance.wire import Abort, Accepted, Add, Delta, Embed, Embedding, Inspect, Refused, Resume, StepReport
from headrace.llm.records import ResumeRecord
from headrace.serve.transcript import Transcript

PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, seed=1)


@pytest.fixture(scope="module")
def llm(tinyworld_checkpoint):
    return LLM(tinyworld_checkpoint, threads=1, num_kv_blocks=40, max_num_batched_tokens=16)


class Driver:
    """Posts messages and lets the instance run until it would sleep."""

    def __init__(self, llm):
        self.batches: list[Any] = []
        self.instance = Instance(llm, self.batches.append)

    def run(self, *commands, steps=10_000):
        """Events of the commands and at most `steps` steps, flat."""
        self.batches.clear()
        for command in commands:
            self.instance._execute(command)
        self.instance._step()
        while self.instance._busy() and (steps := steps - 1):
            self.instance._step()
        return [news for batch in self.batches for news in batch.events]

    def check_empty(self):
        held = vars(self.instance)
        assert not held["_sent"] and not held["_embeds"] and not held["_events"]
        assert not held["_explainer"]._timelines and not held["_explainer"]._names


@pytest.fixture
def driver(llm):
    driver = Driver(llm)
    yield driver
    assert not llm.frontend.has_work
    driver.check_empty()


def kinds(news):
    return [type(item) for item in news]


def test_one_message_a_step_carries_all_its_events(driver):
    adds = [Add(str(i), [5 + i, 6], replace(PARAMS, seed=i)) for i in range(5)]
    driver.run(*adds)
    first = driver.batches[0].events
    assert kinds(first) == [Accepted] * 5 + [Delta] * 5 + [StepReport]
    assert all(kinds(batch.events)[-1] is StepReport for batch in driver.batches)
    assert len(driver.batches) == 12
    assert first[-1].prefill_tokens == 10 and first[-1].decode_tokens == 0
    assert driver.batches[1].events[-1].decode_tokens == 5


def test_text_that_may_become_a_stop_string_comes_later_than_its_tokens(driver, llm):
    text = llm.generate([[5, 6]], PARAMS)[0].outputs[0].text
    never = text[:8] + "\N{SNOWMAN}"
    news = [n for n in driver.run(Add("a", [5, 6], replace(PARAMS, stop=(never,)))) if isinstance(n, Delta)]
    choices = [choice for delta in news for choice in delta.output.outputs]
    assert "".join(c.text for c in choices) == text
    held = [c for c in choices if c.token_ids and not c.text]
    assert held, "its first tokens come without text"


def test_an_abort_frees_all_blocks_before_the_next_step(driver):
    pool = driver.instance._scheduler.cache
    driver.run(Add("stays", [5, 6], PARAMS), Add("goes", list(range(3, 30)), replace(PARAMS, n=2)), steps=4)
    counted = dict(driver.instance._scheduler.stats.finished)
    news = driver.run(Abort("goes"), Abort("goes"), Abort("unknown"), steps=1)
    assert news[-1].stats["finished"]["abort"] == counted["abort"] + 2
    assert news[-1].stats["num_running"] == 1 and pool.held_blocks == 1
    assert [n.name for n in news if isinstance(n, Delta)] == ["stays"]
    news = driver.run(Abort("stays"))
    assert kinds(news) == [StepReport], "an abort that leaves the engine idle is reported all the same"
    assert news[0].stats["finished"]["abort"] == counted["abort"] + 3 and pool.held_blocks == 0


@pytest.mark.parametrize(
    ("command", "message", "param"),
    [
        (Add("bad", [5], SamplingParams(max_tokens=10**6)), "max_tokens=1000000 make 1000001", "max_tokens"),
        (Add("bad", [], SamplingParams()), "no tokens", "prompt"),
        (Add("bad", [5], SamplingParams(logit_bias={10**6: 1.0})), "logit_bias has token id", "logit_bias"),
        (Resume(ResumeRecord.begin("bad", None, [5], PARAMS, fingerprint="other")), "its tokens could differ", None),
        (Embed("bad", [-1]), "prompt has token id -1", "prompt"),
    ],
)
def test_a_refusal_names_the_parameter(driver, command, message, param):
    (news,) = driver.run(command)
    assert isinstance(news, Refused) and news.name == "bad" and message in news.message and news.param == param


def test_embeddings_come_one_a_step_in_their_order_and_may_be_withdrawn(driver):
    news = driver.run(*(Embed(name, [5, 6, 7]) for name in "abc"), Abort("b"), Add("x", [5, 6], PARAMS))
    assert [n.name for n in news if isinstance(n, Embedding)] == ["a", "c"]
    assert sum(isinstance(n, Embedding) for n in driver.batches[0].events) == 1


def test_preemptions_are_in_the_explanation(driver, llm):
    """Ten that grow past what 39 blocks hold."""
    adds = [Add(str(i), [3 + i] * 40, replace(PARAMS, max_tokens=60)) for i in range(10)]
    ends = [n for n in driver.run(*adds) if isinstance(n, Delta) and n.output.finished]
    told = {n.name: n.explanation for n in ends if n.explanation is not None}
    assert len(told) == 10 and sum(e.preemptions for e in told.values()) >= 1
    assert any(e.queue_time > 0 for e in told.values())
    preempted = [e for e in told.values() if e.preemptions]
    assert all(e.chunks > 3 for e in preempted), "its prompt is computed again"


def test_drafts_are_counted_for_each_request_and_go_on_where_it_is_resumed(tinyworld_checkpoint):
    llm = LLM(
        tinyworld_checkpoint, threads=1, num_kv_blocks=40, max_num_batched_tokens=16, speculate="ngram", gamma="4"
    )
    driver = Driver(llm)
    expected = driver.run(Add("plain", [5, 6], PARAMS))
    plain = [c for n in expected if isinstance(n, Delta) for c in n.output.outputs]
    ids = [token for choice in plain for token in choice.token_ids]
    record = ResumeRecord.begin("a", None, [5, 6], replace(PARAMS, prediction=tuple(ids)))
    transcript = Transcript("a", record)
    news = driver.run(transcript.command(llm.fingerprint), steps=2)
    for delta in (n for n in news if isinstance(n, Delta)):
        transcript.take(delta)
    before = transcript.output.accepted_tokens
    assert before == transcript.output.drafted_tokens > 0
    driver.run(Abort("a"))
    ends = [n for n in driver.run(transcript.command(llm.fingerprint)) if isinstance(n, Delta)]
    for delta in ends:
        transcript.take(delta)
    assert transcript.output.outputs[0].token_ids == ids
    explanation = ends[-1].explanation
    assert explanation is not None and explanation.accepted_tokens > 0, "of this process alone"
    assert transcript.output.accepted_tokens == before + explanation.accepted_tokens
    assert transcript.output.drafted_tokens == before + explanation.drafted_tokens
    driver.check_empty()


def test_beams_are_counted_to_their_search(driver):
    params = SamplingParams(beam_width=3, n=2, max_tokens=8, ignore_eos=True, seed=0)
    news = [n for n in driver.run(Add("b", [5, 6, 7], params)) if isinstance(n, Delta)]
    assert len(news) == 1 and news[0].output.finished and len(news[0].output.outputs) == 2
    explanation = news[0].explanation
    assert explanation is not None and explanation.batch_sizes[0] == 1 and max(explanation.batch_sizes) == 3


def test_an_aborted_search_takes_no_neighbour_with_it(driver, llm):
    """The numbers of a search's choices are its own, though it runs as one request at first."""
    expected = llm.generate([[9, 8]], PARAMS)[0]
    search = SamplingParams(beam_width=2, n=2, max_tokens=9, seed=0)
    driver.run(Add("search", [5, 6], search), Add("beside", [9, 8], PARAMS), steps=1)
    first = [c for b in driver.batches for n in b.events if isinstance(n, Delta) for c in n.output.outputs]
    news = driver.run(Abort("search"))
    rest = [c for n in news if isinstance(n, Delta) and n.name == "beside" for c in n.output.outputs]
    assert [t for c in first + rest for t in c.token_ids] == expected.outputs[0].token_ids


def test_nothing_is_kept_of_many_requests(driver):
    for i in range(200):
        driver.run(Add(f"{i}", [5, 6], replace(PARAMS, max_tokens=2)), Inspect("i", 0), Abort(f"{i - 1}"))
        driver.check_empty()


def test_ready_describes_the_engine(driver, llm):
    ready = driver.instance.ready(1.5)
    assert ready.kv_blocks == 39 and ready.block_size == 16 and ready.kv_tokens == 39 * 16
    assert ready.fingerprint == llm.fingerprint and ready.startup_seconds == 1.5
    assert ready.hidden_size == llm.frontend.model_config.hidden_size
