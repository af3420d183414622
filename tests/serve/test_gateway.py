"""`Gateway` over a real instance: its outputs are those of an engine in this process, to the bit."""

import asyncio
from dataclasses import replace

import pytest
import torch

from headrace import LLM, ConfigError, RequestError, SamplingParams
from headrace.attention.context import packed_positions
from headrace.attention.dense import DenseContext
from headrace.serve.errors import RefusedError
from headrace.serve.gateway import Gateway, QueueFullError
from serve.gateway_kit import KINDS, OPTIONS, PROMPT, begun, check_stream, kinds, same, start

LONG = SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tinyworld_checkpoint):
    return LLM(tinyworld_checkpoint, **OPTIONS)


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def served(runner, tinyworld_checkpoint):
    gateway, watcher = runner.run(start(tinyworld_checkpoint))
    yield gateway, watcher
    runner.run(gateway.stop())
    assert gateway.state == "stopped" and gateway.unfinished == 0


@pytest.fixture
def gateway(served):
    yield served[0]
    assert served[0].unfinished == 0, "a request was left behind"


@pytest.fixture
def ids(llm):
    return llm.tokenizer.encode(PROMPT)


def test_every_kind_of_request_is_what_an_engine_gives(runner, gateway, llm, ids):
    wanted = kinds(llm)
    expected = dict(zip(wanted, llm.generate([ids] * len(wanted), list(wanted.values()))))
    assert expected["stopped"].outputs[0].finish_reason == "stop" and len(expected["stopped"].outputs[0].text) > 5

    async def scenario():
        streams = {kind: await gateway.open(kind, PROMPT, ids, params) for kind, params in wanted.items()}
        await asyncio.gather(*(check_stream(stream, expected[kind]) for kind, stream in streams.items()))
        again = await gateway.open("again", PROMPT, ids, KINDS["choices"])
        same(await again.result(), expected["choices"])
        assert again.output.prompt == PROMPT and again.output.request_id == "again"

    runner.run(scenario())


def test_a_request_without_a_seed_is_given_one(runner, gateway, ids):
    async def scenario():
        streams = [await gateway.open("a", None, ids, SamplingParams(max_tokens=40, ignore_eos=True)) for _ in "ab"]
        one, two = [await stream.result() for stream in streams]
        assert one.outputs[0].token_ids != two.outputs[0].token_ids
        again = await gateway.open("a", None, ids, streams[0].transcript.params)
        same(await again.result(), one)

    runner.run(scenario())


async def _until_idle(gateway):
    async for report in gateway.reports():
        yield report
        if not report.stats["num_running"]:
            return


def test_a_closed_stream_frees_its_blocks_and_generates_no_more(runner, gateway, llm, ids):
    neighbour = llm.generate([ids], LONG)[0]

    async def scenario():
        beside = await gateway.open("beside", None, ids, LONG)
        before = gateway.report.stats["finished"]["abort"]
        stream = await gateway.open("leaves", None, ids[::-1], LONG)
        async for _ in stream:
            break
        await stream.close()
        await stream.close()
        held = len(stream.output.outputs[0].token_ids)
        later = [report async for report in _until_idle(gateway) if report.stats["finished"]["abort"] > before]
        assert {report.stats["finished"]["abort"] for report in later} == {before + 1}
        assert {report.decode_tokens for report in later} == {1}, "its sibling runs on, and it alone"
        assert later[0].stats["num_running"] == 1
        assert sum(len(c.token_ids) for delta in [d async for d in stream] for c in delta.output.outputs) == held - 1
        assert stream.output.outputs[0].finish_reason == "abort"
        same(await beside.result(), neighbour)
        assert gateway.report.stats["num_running"] == 0 and gateway.report.stats["kv_usage"] == 0.0

    runner.run(scenario())


def test_a_caller_that_is_cancelled_while_it_waits_leaves_nothing(runner, gateway, ids):
    async def scenario():
        opening = await begun(gateway.open("gone", None, ids, LONG))
        embedding = await begun(gateway.embed("gone", ids))
        assert gateway.unfinished == 2
        opening.cancel()
        embedding.cancel()
        ends = await asyncio.gather(opening, embedding, return_exceptions=True)
        assert [type(end) for end in ends] == [asyncio.CancelledError] * 2
        assert gateway.unfinished == 0
        after = await gateway.open("after", None, ids, SamplingParams(max_tokens=2))
        await after.result()
        assert gateway.report.stats["num_running"] == 0

    runner.run(scenario())


@pytest.mark.parametrize(
    ("prompt", "params", "message", "param"),
    [
        ([1, 2, 3], SamplingParams(max_tokens=100_000), "max_tokens=100000 make 100003, more than", "max_tokens"),
        ([], SamplingParams(), "prompt has no tokens", "prompt"),
        ([10**6], SamplingParams(), "prompt has token id 1000000", "prompt"),
        ([1], SamplingParams(stop_token_ids=(10**6,)), "stop_token_ids has token id", "stop_token_ids"),
        ([1], SamplingParams(stop=("\ud800",)), "cannot be sent", None),
        ([2**70], SamplingParams(), "cannot be sent", None),
        ([1], SamplingParams(logprobs=6), "logprobs=6 is more than this server's limit of 5", "logprobs"),
        ([1], SamplingParams(prompt_logprobs=6), "prompt_logprobs=6 is more", "prompt_logprobs"),
    ],
)
def test_what_can_never_be_served_is_refused(runner, gateway, monkeypatch, prompt, params, message, param):
    monkeypatch.setattr(gateway, "_max_logprobs", 5)
    with pytest.raises(RefusedError, match=message) as caught:
        runner.run(gateway.open("bad", None, prompt, params))
    assert caught.value.param == param


def test_a_full_queue_gives_a_retry_after(runner, gateway, monkeypatch, ids):
    monkeypatch.setattr(gateway, "max_queue", 2)
    monkeypatch.setattr(gateway, "max_num_seqs", 2)

    async def scenario():
        crowd = await gateway.open("alone", None, ids, replace(LONG, n=9, seed=1))
        with pytest.raises(QueueFullError, match="7 sequences wait") as caught:
            await gateway.open("late", None, ids, SamplingParams(max_tokens=5))
        assert 1 <= caught.value.retry_after <= 60
        with pytest.raises(QueueFullError):
            await gateway.embed("late", ids)
        await crowd.close()
        four = [await gateway.open(f"{i}", None, ids, LONG) for i in range(4)]
        with pytest.raises(QueueFullError, match="2 sequences wait"):
            await gateway.open("fifth", None, ids, LONG)
        for stream in four:
            stream.abandon()
        await (await gateway.open("now", None, ids, SamplingParams(max_tokens=2))).result()

    runner.run(scenario())


def test_an_embedding_is_the_mean_of_the_last_hidden_states(runner, gateway, llm, ids):
    model, ops = llm.frontend.engine.runner.model, llm.frontend.engine.runner.ops
    ctx = DenseContext(ops, model.config, [len(ids)])
    hidden_TD = model.hidden(torch.tensor(ids), packed_positions([len(ids)], ops.device), ctx)
    logits_TV = model.forward(torch.tensor(ids), packed_positions([len(ids)], ops.device), ctx)
    assert torch.equal(model.lm_head(hidden_TD), logits_TV)

    async def scenario():
        busy = await gateway.open("busy", None, ids, LONG)
        vectors = await asyncio.gather(*(gateway.embed("e", tokens) for tokens in (ids, ids[:1], ids)))
        assert not busy.output.finished, "embeddings are made between steps"
        await busy.close()
        with pytest.raises(RequestError, match="longer than the context"):
            await gateway.embed("long", ids * 100)
        with pytest.raises(RequestError, match="no tokens"):
            await gateway.embed("none", [])
        with pytest.raises(RequestError, match="vocabulary"):
            await gateway.embed("unknown", [10**6])
        return [embedding.vector for embedding in vectors]

    vectors = runner.run(scenario())
    assert vectors[0] == vectors[2] != vectors[1] and len(vectors[0]) == gateway.info.hidden_size
    assert torch.allclose(torch.tensor(vectors[0]), hidden_TD.mean(dim=0).detach(), atol=1e-6)


def test_the_radix_tree_shows_prefixes_and_who_holds_them(runner, gateway, llm, ids):
    async def scenario():
        stream = await gateway.open("holds", None, ids, LONG)
        async for _ in stream:
            break
        tree = await gateway.inspect()
        few = await gateway.inspect(max_nodes=1)
        await stream.close()
        return tree, few

    tree, few = runner.run(scenario())
    numbers = {row[0] for row in tree.nodes}
    assert tree.complete and len(numbers) == len(tree.nodes)
    assert all(row[1] in numbers | {-1} and row[2] == 16 for row in tree.nodes)
    assert len(few.nodes) == 1 and not few.complete
    first = llm.tokenizer.decode(ids[:8], skip_special_tokens=False)
    assert any(row[4] == first and row[1] == -1 and row[3] >= 1 for row in tree.nodes)


def test_an_explanation_accounts_for_the_time(runner, gateway, llm):
    prompt = llm.tokenizer.encode("3+4=7 " * 40)

    async def scenario():
        cold = await gateway.open("cold", None, prompt, SamplingParams(max_tokens=6, ignore_eos=True))
        await cold.result()
        warm = await gateway.open("warm", None, prompt, SamplingParams(max_tokens=6, ignore_eos=True, n=2))
        await warm.result()
        return cold.explanation, warm.explanation

    cold, warm = runner.run(scenario())
    assert cold.chunks == -(-len(prompt) // 48) and cold.num_cached_tokens == 0
    assert cold.batch_sizes == [1] * (cold.chunks + 5)
    assert cold.queue_time >= 0 and cold.prefill_time > 0 and cold.decode_time > 0
    assert warm.num_cached_tokens >= len(prompt) - 32 and warm.chunks <= 2 and 2 in warm.batch_sizes
    assert cold.preemptions == warm.preemptions == cold.resumes == 0


def test_the_observer_is_called_in_order_and_reports_lose_the_oldest(runner, served, ids):
    gateway, watcher = served

    async def scenario():
        watcher.told.clear()
        steps = watcher.steps
        feed = gateway.reports()
        first = await begun(anext(feed))
        stream = await gateway.open("seen", None, ids, SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True))
        await stream.result()
        assert watcher.steps - steps >= 150
        late = [(await first).stats["steps"], (await anext(feed)).stats["steps"]]
        assert late[1] - late[0] > 50, "a reader that sleeps skips"
        await feed.aclose()
        with pytest.raises(RequestError):
            await gateway.open("bad", None, [], SamplingParams())

    runner.run(scenario())
    assert watcher.told == [
        ("arrived", "seen", len(ids)), ("first_token", "seen"), ("finished", "seen", "length"),
        ("arrived", "bad", 0), ("finished", "bad", "refused"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"block_size": 7}, {}, "block_size"),
        ({}, {"max_logprobs": 99}, "max_logprobs=99"),
        ({}, {"max_queue": -1}, "max_queue=-1"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_starts(options, settings, message):
    with pytest.raises(ConfigError, match=message):
        Gateway("nowhere", options, **{"max_queue": 1, **settings})
