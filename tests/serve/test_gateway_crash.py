"""The instance is killed at random moments under many streams: each ends with the tokens of an undisturbed run."""

import asyncio
import random
from dataclasses import replace

import pytest

from headrace import LLM, SamplingParams
from headrace.instance.server import Instance
from headrace.instance.wire import Add, Delta, EventBatch, Resume
from headrace.llm.records import ResumeRecord
from headrace.serve.transcript import Transcript
from serve.gateway_kit import OPTIONS, PROMPT, check_stream, kinds, start

STREAMS = 32


@pytest.fixture(scope="module")
def llm(tinyworld_checkpoint):
    return LLM(tinyworld_checkpoint, **OPTIONS)


def crowd(llm):
    """(prompt ids, params) for every stream: each kind of request, with seeds and prompts of its own."""
    base = list(kinds(llm).values())
    ids = llm.tokenizer.encode(PROMPT)
    return [
        (ids if i < len(base) else ids[: 8 + i], replace(base[i % len(base)], seed=base[i % len(base)].seed or i))
        for i in range(STREAMS)
    ]


ATTEMPTS = 20
"""An engine that is ahead of its gateway may have sent the last token before it dies; then the test asks again."""


@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=pytest.mark.soak)])
def test_streams_survive_the_death_of_their_engine(tinyworld_checkpoint, llm, rounds):
    requests = crowd(llm)
    expected = llm.generate([ids for ids, _ in requests], [params for _, params in requests])
    draw = random.Random(rounds)

    async def death_in_a_crowd(gateway, watcher):
        watcher.restart.clear()
        watcher.deltas, watcher.kill_at = 0, [draw.randrange(1, 700)]
        streams = await asyncio.gather(*(gateway.open(f"{i}", None, *r) for i, r in enumerate(requests)))
        await asyncio.gather(*(check_stream(s, e) for s, e in zip(streams, expected)))
        assert not watcher.kill_at
        await watcher.restart.wait()
        resumes = [stream.explanation.resumes for stream in streams if stream.explanation is not None]
        assert len(resumes) == len(streams) and set(resumes) <= {0, 1}
        return any(resumes)

    async def scenario():
        gateway, watcher = await start(tinyworld_checkpoint)
        deaths, met = 0, 0
        try:
            while met < rounds and deaths < rounds + ATTEMPTS:
                met += await death_in_a_crowd(gateway, watcher)
                deaths += 1
            assert met == rounds
            assert gateway.restarts == deaths and gateway.unfinished == 0
        finally:
            await gateway.stop()

    asyncio.run(scenario())


def test_two_deaths_in_one_request_and_one_while_it_waits(tinyworld_checkpoint, llm):
    """A death between the tokens of a stop string, and one before the prompt's log-probabilities are complete."""
    wanted = kinds(llm)
    ids = llm.tokenizer.encode(PROMPT)
    expected = dict(zip(wanted, llm.generate([ids] * len(wanted), list(wanted.values()))))
    length = len(expected["stopped"].outputs[0].token_ids)

    def check_scored(stream):
        assert stream.output.outputs == expected["scored"].outputs
        assert stream.output.prompt_logprobs == expected["scored"].prompt_logprobs

    async def two_deaths(gateway, watcher):
        watcher.deltas, watcher.kill_at = 0, [length - 3, length - 1]
        held = await gateway.open("stopped", PROMPT, ids, wanted["stopped"])
        waits = await gateway.open("scored", PROMPT, ids, wanted["scored"])
        await check_stream(held, expected["stopped"])
        watcher.kill_at = []
        await waits.result()
        check_scored(waits)
        return held.explanation.resumes == 2

    async def death_in_the_prompt(gateway, watcher):
        scored = await gateway.open("scored", PROMPT, ids, wanted["scored"])
        async for delta in scored:
            assert delta.output.prompt_logprobs and not delta.output.outputs, "the prompt comes in chunks"
            break
        watcher.kill_at = [0]
        watcher._count()
        await scored.result()
        watcher.kill_at = []
        check_scored(scored)
        return scored.explanation.resumes == 1

    async def scenario():
        gateway, watcher = await start(tinyworld_checkpoint, options={"max_num_batched_tokens": 8, "max_num_seqs": 1})
        try:
            for attempt in (two_deaths, death_in_the_prompt):
                for _ in range(ATTEMPTS):
                    if met := await attempt(gateway, watcher):
                        break
                assert met
        finally:
            await gateway.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["greedy", "choices", "scored", "beam", "stopped", "stop shown", "penalised"])
@pytest.mark.parametrize("steps", [1, 3, 5, 9, 17, 28])
def test_a_transcript_is_a_resume_record_at_every_step(llm, kind, steps):
    """Without a process: an engine resumes from the transcript after some steps."""
    ids, params = llm.tokenizer.encode(PROMPT), kinds(llm)[kind]
    params = replace(params, seed=params.seed or 1)
    expected = llm.generate([ids], params)[0]
    batches: list[EventBatch] = []
    transcript = Transcript("1", ResumeRecord.begin("name", PROMPT, ids, params))
    for _ in range(2):
        instance = Instance(llm, batches.append)
        instance._execute(transcript.command(llm.fingerprint))
        count = steps
        while instance._busy() and count:
            instance._step()
            count -= 1
        for batch in batches:
            for news in batch.events:
                if isinstance(news, Delta):
                    transcript.take(news)
        batches.clear()
        instance._abort("1")
        if not transcript.output.finished and any(c.token_ids for c in transcript.output.outputs):
            assert isinstance(transcript.command(llm.fingerprint), Resume)
        steps = 10_000
    assert transcript.output.outputs == expected.outputs
    assert transcript.output.prompt_logprobs == expected.prompt_logprobs
    assert not llm.frontend.has_work


SAMPLED = {
    "plain": SamplingParams(temperature=1.0, seed=11, max_tokens=120, ignore_eos=True, logprobs=0),
    "narrow": SamplingParams(temperature=0.7, seed=12, max_tokens=120, ignore_eos=True, top_p=0.9, top_k=20),
    "choices": SamplingParams(
        temperature=0.8, seed=13, max_tokens=120, ignore_eos=True, n=2, repetition_penalty=1.1, min_tokens=9
    ),
}


def drafted_in_both(stream):
    """Whether drafts were accepted before the death of the stream's engine, and after it."""
    told = stream.explanation
    return told.resumes == 1 and 0 < told.accepted_tokens < stream.output.accepted_tokens


async def death_under_drafts(folder, llm, **options):
    """Seeded streams with drafts against an engine without: undisturbed at first, then over deaths of their engine.

    Four outputs are written at a time; a second request of each kind waits, and drafts from the first's text.
    """
    ids, each = llm.tokenizer.encode(PROMPT), list(SAMPLED.values()) * 2
    expected = llm.generate([ids] * len(each), each)
    gateway, watcher = await start(folder, options={"gamma": "3", "max_num_seqs": 4, **options})

    async def wave():
        streams = await asyncio.gather(*(gateway.open(f"{i}", None, ids, params) for i, params in enumerate(each)))
        await asyncio.gather(*(check_stream(s, e) for s, e in zip(streams, expected)))
        return streams

    try:
        quiet = await wave()
        assert gateway.restarts == 0 and sum(stream.output.accepted_tokens for stream in quiet) > 0
        for deaths in range(1, ATTEMPTS + 1):
            watcher.deltas, watcher.kill_at = 0, [20]
            streams = await wave()
            assert gateway.restarts == deaths and not watcher.kill_at
            if met := any(map(drafted_in_both, streams)):
                break
        assert met
    finally:
        await gateway.stop()


@pytest.mark.parametrize("who", ["suffix", "draft"])
def test_streams_with_drafts_survive_the_death_of_their_engine(tinyworld_checkpoint, llm, who):
    """Token for token; the draft model is the target itself."""
    speculate = f"draft:{tinyworld_checkpoint}" if who == "draft" else who
    asyncio.run(death_under_drafts(tinyworld_checkpoint, llm, speculate=speculate))


def test_drafts_that_change_tokens_are_seen(tinyworld_checkpoint, llm):
    """The verifier `rejection` keeps only the distribution."""
    with pytest.raises(AssertionError) as caught:
        options = {"speculate": f"draft:{tinyworld_checkpoint}", "verifier": "rejection"}
        asyncio.run(death_under_drafts(tinyworld_checkpoint, llm, **options))
    assert caught.traceback[-1].name == "same"


def test_a_resumed_stream_with_another_seed_is_seen(tinyworld_checkpoint, llm, monkeypatch):
    command = Transcript.command

    def reseeded(self, fingerprint):
        made = command(self, fingerprint)
        if isinstance(made, Add):
            return made
        params = replace(made.record.params, seed=1 + (made.record.params.seed or 0))
        return Resume(replace(made.record, params=params))

    monkeypatch.setattr(Transcript, "command", reseeded)
    with pytest.raises(AssertionError) as caught:
        asyncio.run(death_under_drafts(tinyworld_checkpoint, llm, speculate="suffix"))
    assert caught.traceback[-1].name == "same"
