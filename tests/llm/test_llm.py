"""`LLM` and `AsyncLLM`, on a small trained model."""

import asyncio
import json
import math
import shutil

import pytest

from headrace import LLM, AsyncLLM, CheckpointError, Logprob, RequestError, ResumeRecord, SamplingParams
from headrace.engine.engine import EngineFailedError
from headrace.engine.schedule.request import RequestUpdate
from headrace.llm.async_llm import EngineStoppedError
from headrace.llm.outputs import CompletionOutput
from headrace.llm.processor import Choice

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tinyworld_checkpoint):
    return tinyworld_checkpoint


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, num_kv_blocks=200)


def test_generate_keeps_the_order_of_prompts(llm):
    prompts = ["One day", "Once upon a time, there was", "3+4="]
    outputs = llm.generate(prompts, GREEDY)
    assert [o.prompt for o in outputs] == prompts
    assert all(o.finished and len(o.outputs[0].token_ids) == 12 for o in outputs)
    assert [o.outputs[0].text for o in outputs] == [llm.generate(p, GREEDY)[0].outputs[0].text for p in prompts]
    assert outputs[0].prompt_token_ids == llm.tokenizer.encode("One day")


def test_prompts_come_in_four_forms(llm):
    ids = llm.tokenizer.encode("One day")
    forms = ["One day", ids, {"prompt": "One day"}, {"prompt_token_ids": ids}]
    texts = {llm.generate(form, GREEDY)[0].outputs[0].text for form in forms}
    assert len(texts) == 1


def test_logprobs_are_of_the_chosen_token_and_the_best(llm):
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=8, logprobs=3, ignore_eos=True)
    choice = llm.generate("One day", params)[0].outputs[0]
    assert len(choice.logprobs) == len(choice.token_ids) == 8
    for token, table in zip(choice.token_ids, choice.logprobs):
        assert next(iter(table)) == token and isinstance(table[token], Logprob)
        assert 3 <= len(table) <= 4 and sorted(e.rank for e in table.values())[:3] == [1, 2, 3]
        ranked = sorted(table.values(), key=lambda e: e.rank)
        assert all(a.logprob >= b.logprob for a, b in zip(ranked, ranked[1:]))
        assert table[token].decoded_token == llm.tokenizer.token_text(token)
    chosen = sum(table[token].logprob for token, table in zip(choice.token_ids, choice.logprobs))
    assert math.isclose(choice.cumulative_logprob, chosen, rel_tol=1e-6)
    zero = llm.generate("One day", SamplingParams(seed=3, max_tokens=8, logprobs=0, ignore_eos=True))[0].outputs[0]
    assert [list(table) for table in zero.logprobs] == [[token] for token in choice.token_ids]
    assert llm.generate("One day", GREEDY)[0].outputs[0].logprobs is None


def test_prompt_logprobs_are_recomputed_and_equal_generation_s(llm):
    done = llm.generate(
        "Once upon a time", SamplingParams(temperature=0.0, max_tokens=30, logprobs=1, ignore_eos=True)
    )[0]
    whole = done.prompt_token_ids + done.outputs[0].token_ids
    echo = llm.generate([whole], SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, ignore_eos=True))[0]
    assert echo.num_cached_tokens == 0 and echo.prompt_logprobs[0] is None and len(echo.prompt_logprobs) == len(whole)
    again = echo.prompt_logprobs[len(done.prompt_token_ids) :]
    assert [t[i].logprob for t, i in zip(again, whole[len(done.prompt_token_ids) :])] == [
        t[i].logprob for t, i in zip(done.outputs[0].logprobs, done.outputs[0].token_ids)
    ]


def test_the_cache_changes_nothing_but_the_count(llm):
    prompt = "Once upon a time, there was a child called Mia, who lived at the tower. One day Mia took"
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    first, second = (llm.generate(prompt, params)[0] for _ in range(2))
    assert 0 < second.num_cached_tokens < len(first.prompt_token_ids) and first.outputs == second.outputs
    both = first.prompt_token_ids + first.outputs[0].token_ids
    assert llm.generate([both], params)[0].num_cached_tokens > len(first.prompt_token_ids), "generated tokens hit too"


def test_n_choices_differ_and_are_what_each_alone_would_be(llm):
    params = SamplingParams(n=3, seed=5, temperature=1.0, max_tokens=12, ignore_eos=True)
    choices = llm.generate("One day", params)[0].outputs
    assert [c.index for c in choices] == [0, 1, 2] and len({c.text for c in choices}) == 3
    alone = llm.generate("One day", SamplingParams(seed=5, temperature=1.0, max_tokens=12, ignore_eos=True))[0].outputs[
        0
    ]
    assert alone.token_ids == choices[0].token_ids
    assert llm.generate("One day", params)[0].outputs == choices


def test_stop_strings_and_ids(llm):
    free = llm.generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=30))[0].outputs[0]
    stop = free.text[4:9]
    cut = llm.generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=30, stop=stop))[0].outputs[0]
    assert cut.text == free.text[: free.text.index(stop)] and (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    kept = SamplingParams(temperature=0.0, max_tokens=30, stop=stop, include_stop_str_in_output=True)
    assert llm.generate("Once upon a time", kept)[0].outputs[0].text.endswith(stop)
    token = free.token_ids[3]
    by_id = llm.generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=30, stop_token_ids=(token,)))[
        0
    ].outputs[0]
    assert by_id.token_ids == free.token_ids[: free.token_ids.index(token) + 1] and by_id.stop_reason == token


def test_bans_bias_and_penalties_act(llm):
    free = llm.generate("One day", GREEDY)[0].outputs[0].token_ids
    banned = (
        llm.generate(
            "One day", SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logit_bias={free[0]: -100.0})
        )[0]
        .outputs[0]
        .token_ids
    )
    assert free[0] not in banned
    allowed = llm.generate("One day", SamplingParams(max_tokens=12, ignore_eos=True, allowed_token_ids=(7, 9), seed=1))[
        0
    ]
    assert set(allowed.outputs[0].token_ids) <= {7, 9}
    pushed = SamplingParams(temperature=0.0, max_tokens=40, frequency_penalty=2.0, ignore_eos=True)
    assert len(set(llm.generate("One day", pushed)[0].outputs[0].token_ids)) > len(
        set(
            llm.generate("One day", SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))[0]
            .outputs[0]
            .token_ids
        )
    )
    end = llm.tokenizer.eos_token_id
    late = SamplingParams(temperature=0.0, max_tokens=12, min_tokens=6, logit_bias={end: 100.0})
    assert llm.generate("One day", late)[0].outputs[0].token_ids.index(end) == 6


def test_beams_are_at_least_as_likely_as_greedy(llm):
    greedy = llm.generate("One day", SamplingParams(temperature=0.0, max_tokens=10, logprobs=0, ignore_eos=True))[
        0
    ].outputs[0]
    beams = llm.generate("One day", SamplingParams(beam_width=4, n=3, max_tokens=10, ignore_eos=True))[0].outputs
    scores = [b.cumulative_logprob for b in beams]
    assert scores == sorted(scores, reverse=True) and len({tuple(b.token_ids) for b in beams}) == 3
    assert scores[0] >= greedy.cumulative_logprob


def test_stream_grows_and_leaving_it_frees_everything(llm):
    texts = [o.outputs[0].text for o in llm.stream("One day", GREEDY)]
    assert (
        all(b.startswith(a) for a, b in zip(texts, texts[1:]))
        and texts[-1] == llm.generate("One day", GREEDY)[0].outputs[0].text
    )
    for _ in llm.stream("One day", GREEDY):
        break
    stats = llm.frontend.engine.scheduler.stats
    assert stats.num_running == stats.num_waiting == stats.physical_blocks == 0


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(n=3, seed=9, temperature=1.0, max_tokens=30, logprobs=1, ignore_eos=True),
        SamplingParams(
            seed=2, repetition_penalty=1.3, frequency_penalty=0.4, max_tokens=30, stop=("zzz",), ignore_eos=True
        ),
        SamplingParams(beam_width=2, n=1, max_tokens=12, ignore_eos=True),
    ],
)
@pytest.mark.parametrize("steps", [1, 9])
def test_a_resumed_request_ends_as_if_nothing_had_happened(llm, folder, params, steps):
    expected = llm.generate("Once upon a time", params)[0]
    name = llm.frontend.add("Once upon a time", params)
    for _ in range(steps):
        llm.frontend.step()
    record = json.loads(json.dumps(llm.frontend.resume_record(name).to_dict()))
    llm.frontend.abort(name)
    resumed = LLM(folder, num_kv_blocks=60).resume([ResumeRecord.from_dict(record)])[0]
    assert resumed.outputs == expected.outputs


def test_resume_refuses_another_fingerprint_and_broken_records(llm, folder):
    name = llm.frontend.add("One day", GREEDY)
    record = llm.frontend.resume_record(name)
    llm.frontend.abort(name)
    with pytest.raises(RequestError, match="its tokens could differ"):
        LLM(folder, num_kv_blocks=60, kv_cache_dtype="bf16").resume([record])
    with pytest.raises(RequestError, match="broken"):
        llm.resume([ResumeRecord.from_dict({"fingerprint": llm.fingerprint})])
    record.output.outputs[0].finish_reason = "stop"
    with pytest.raises(RequestError, match=r"broken.*finished"):
        llm.resume([record])
    record.output.outputs[0].finish_reason = None
    record.output.outputs[0].token_ids.append(10**6)
    with pytest.raises(RequestError, match="token id 1000000"):
        llm.resume([record])
    assert not llm.frontend.has_work


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ("x" * 3000, GREEDY, "leaves no room"),
        ("One", SamplingParams(max_tokens=5000), "ask for at most"),
        ([[5, 99999]], GREEDY, "token id 99999"),
        ("One", SamplingParams(logit_bias={99999: 1.0}), "logit_bias has token id 99999"),
        ([[]], GREEDY, "no tokens"),
        ([3.5], GREEDY, "text or token ids"),
        (["a", "b"], [GREEDY], "1 params for 2 prompts"),
        ({"text": "a"}, GREEDY, "prompt_token_ids"),
    ],
)
def test_bad_requests_are_refused_and_nothing_is_left(llm, prompts, params, message):
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, params)
    assert not llm.frontend.has_work


def test_async_streams_share_one_engine(folder):
    async def scenario():
        async with AsyncLLM(folder, num_kv_blocks=200) as llm:

            async def one(seed):
                async for output in llm.stream("One day", SamplingParams(seed=seed, max_tokens=10, ignore_eos=True)):
                    last = output
                return last.outputs[0].token_ids

            together = await asyncio.gather(*(one(i) for i in range(6)))
            assert together == [await one(i) for i in range(6)]
            async for _ in llm.stream("One day", SamplingParams(max_tokens=200, ignore_eos=True)):
                break
            await llm.generate("One", GREEDY)
            aborting = asyncio.create_task(
                llm.generate("One", SamplingParams(max_tokens=300, ignore_eos=True), request_id="r")
            )
            async for _ in llm.stream("One day", SamplingParams(max_tokens=3, ignore_eos=True)):
                await llm.abort("r")
            assert (await aborting).outputs[0].finish_reason == "abort"
            with pytest.raises(RequestError):
                await llm.generate("One", SamplingParams(max_tokens=5000))
            assert llm.frontend.engine.scheduler.stats.num_running == 0
            never = asyncio.create_task(llm.generate("One", SamplingParams(max_tokens=400, ignore_eos=True)))
            async for _ in llm.stream("One day", SamplingParams(max_tokens=2, ignore_eos=True)):
                pass
        with pytest.raises(EngineStoppedError):
            await never
        with pytest.raises(EngineStoppedError):
            await llm.generate("One", GREEDY)

    asyncio.run(scenario())


def test_async_construction_reports_the_fault(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        AsyncLLM(tmp_path)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_step_that_raises_is_the_last(folder, monkeypatch, error, depth):
    """The prompt is in the prefix cache, but not computed: the same prompt would read wrong KV."""
    llm = LLM(folder, num_kv_blocks=60, queue_depth=depth)

    def fail(plan):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(llm.frontend.engine.runner, "submit", fail)
        with pytest.raises(error):
            llm.generate("Once upon a time, there was a child called Mia, who lived", GREEDY)
    with pytest.raises(EngineFailedError, match="make a new engine") as caught:
        llm.generate("Once upon a time, there was a child called Mia, who lived", GREEDY)
    assert isinstance(caught.value.__cause__, error)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"do_sample": False, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1},
            {"temperature": 0.0, "repetition_penalty": 1.1},
        ),
        ({"do_sample": False}, {"temperature": 0.0}),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1, "top_p": None},
            {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1},
        ),
    ],
)
def test_defaults_are_those_of_the_model(folder, tmp_path, given, expected):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    llm = LLM(tmp_path, num_kv_blocks=60)
    assert llm.default_sampling_params() == expected


def test_chat_takes_every_form_of_a_message(llm):
    ask = {"role": "user", "content": "hi"}
    plain = [ask, {"role": "assistant", "content": ""}, {"role": "user", "content": "a\nb"}]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    other = [ask, {"role": "assistant", "content": None}, {"role": "user", "content": parts}]
    assert llm.chat_prompt(other) == llm.chat_prompt(plain)
    assert llm.chat(other, GREEDY).outputs[0].token_ids == llm.chat(plain, GREEDY).outputs[0].token_ids


def test_chat_stops_a_template_that_does_not_end(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(endless)
    with LLM(tmp_path / "model", num_kv_blocks=20) as llm:
        with pytest.raises(CheckpointError, match="the chat template took longer than 2 s and was stopped"):
            llm.chat([{"role": "user", "content": "hi"}], GREEDY)
        assert llm.generate("One day", GREEDY)[0].finished


@pytest.mark.parametrize("skip", [True, False])
def test_a_stop_string_that_is_a_special_token_stops(llm, skip):
    token = llm.tokenizer.token_id("<|assistant|>")
    params = {"stop": "<|assistant|>", "logit_bias": {token: 100.0}, "skip_special_tokens": skip, "max_tokens": 9}
    choice = llm.generate("One day", SamplingParams(**params))[0].outputs[0]
    assert (choice.text, choice.token_ids, choice.finish_reason, choice.stop_reason) == (
        "",
        [token],
        "stop",
        "<|assistant|>",
    )
    kept = llm.generate("One day", SamplingParams(**params, include_stop_str_in_output=True, min_tokens=3))[0]
    shown = "" if skip else "<|assistant|>" * 3
    assert kept.outputs[0].text == shown + "<|assistant|>" and len(kept.outputs[0].token_ids) == 4


@pytest.mark.parametrize(("stop", "text", "reason"), [("a<|end|>", "a", "a<|end|>"), ("b<|end|>", "aa", None)])
def test_a_stop_string_may_end_in_the_token_that_ends_the_output(llm, stop, text, reason):
    [a] = llm.tokenizer.encode("a", add_special_tokens=False)
    choice = Choice(CompletionOutput(0), [], SamplingParams(stop=stop), llm.tokenizer)
    choice.take(RequestUpdate(1, 1, [a, a, llm.tokenizer.eos_token_id], [], finish_reason="stop"))
    assert (choice.output.text, choice.output.finish_reason, choice.output.stop_reason) == (text, "stop", reason)
