"""Speculation as users turn it on: the same answers, and options that say what is wrong."""

import json
from dataclasses import replace
from typing import Any

import pytest

from headrace import LLM, SamplingParams
from headrace.bench.models import random_model
from headrace.cache.key import CacheKey
from headrace.engine.schedule.request import RequestUpdate
from headrace.errors import ConfigError, HeadraceError, RequestError
from headrace.kernels.load import load_ops
from headrace.llm.options import EngineOptions
from headrace.llm.outputs import CompletionOutput, RequestOutput
from headrace.llm.processor import Choice
from headrace.llm.records import ResumeRecord
from headrace.model.folder import read_config
from headrace.model.huggingface import load_model, save_model
from headrace.text.tokenizer import Tokenizer

PROMPTS = ["One day", "Once upon a time, Mia lived at the market. Once upon a time, Mia", "Tom"]
ASKED = [
    SamplingParams(temperature=0.0, max_tokens=60, logprobs=2, stop=("the",)),
    SamplingParams(temperature=1.0, seed=3, max_tokens=60, n=3, repetition_penalty=1.2, min_tokens=8),
    SamplingParams(temperature=0.7, seed=4, max_tokens=60, logprobs=0, prompt_logprobs=1, top_p=0.9),
    SamplingParams(max_tokens=12, beam_width=3, n=2),
]


def answers(folder, **options):
    with LLM(folder, threads=1, num_kv_blocks=200, **options) as llm:
        each = [llm.generate(PROMPTS, params) for params in ASKED]
        stats = llm.frontend.engine.scheduler.stats
        return [[(o.prompt_logprobs, o.outputs) for o in some] for some in each], stats, llm.fingerprint


@pytest.fixture(scope="module")
def plain(tinyworld_checkpoint):
    return answers(tinyworld_checkpoint)


@pytest.mark.parametrize("gamma", ["auto", "1", "5"])
@pytest.mark.parametrize("who", ["ngram", "suffix", "draft"])
def test_answers_are_those_without_speculation(who, gamma, plain, tinyworld_checkpoint, other_checkpoint):
    speculate = f"draft:{other_checkpoint}" if who == "draft" else who
    given, stats, fingerprint = answers(tinyworld_checkpoint, speculate=speculate, gamma=gamma)
    assert (given, fingerprint) == (plain[0], plain[2])
    assert stats.drafted_tokens >= stats.accepted_tokens
    if gamma != "auto":
        assert stats.drafted_tokens > 0 and len(stats.accepted_at) == int(gamma)
        assert who == "ngram" or stats.accepted_tokens > 0  # such short answers do not repeat themselves


def test_a_prediction_drafts_without_speculate(tinyworld_checkpoint):
    asked = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)
    with LLM(tinyworld_checkpoint, threads=1, num_kv_blocks=200) as llm:
        [expected] = llm.generate(["One day"], asked)
        stats = llm.frontend.engine.scheduler.stats
        steps = stats.steps
        assert stats.drafted_tokens == 0
        known = tuple(expected.outputs[0].token_ids)
        [again] = llm.generate(["One day"], replace(asked, prediction=known))
        assert again.outputs[0].token_ids == expected.outputs[0].token_ids
        assert stats.accepted_tokens > 20 and stats.steps - steps < steps
        with pytest.raises(RequestError, match="prediction"):
            llm.generate(["One day"], replace(asked, prediction=(10**6,)))
    with pytest.raises(RequestError, match="prediction does not go with a beam search"):
        replace(asked, prediction=(1,), beam_width=2)


def test_weights_change_under_drafts(tinyworld_checkpoint, other_checkpoint):
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    with LLM(other_checkpoint, threads=1, num_kv_blocks=200) as other:
        expected = [o.outputs for o in other.generate(PROMPTS, params)]
    for who in ("suffix", f"draft:{other_checkpoint}"):
        with LLM(tinyworld_checkpoint, threads=1, num_kv_blocks=200, speculate=who, gamma="3") as llm:
            llm.generate(PROMPTS, params)
            llm.update_weights(other_checkpoint)
            assert [o.outputs for o in llm.generate(PROMPTS, params)] == expected


def test_rejection_has_a_fingerprint_of_its_own_and_is_exact_at_temperature_0(tinyworld_checkpoint, other_checkpoint):
    greedy = SamplingParams(temperature=0.0, max_tokens=40)
    sampled = SamplingParams(temperature=1.0, seed=5, max_tokens=40, ignore_eos=True)
    with LLM(tinyworld_checkpoint, threads=1, num_kv_blocks=200) as llm:
        expected, fingerprint = llm.generate(PROMPTS, greedy), llm.fingerprint
    seen = {fingerprint}
    for more in ({}, {"lenience": 0.5}):
        options: dict[str, Any] = {
            "speculate": f"draft:{other_checkpoint}",
            "verifier": "rejection",
            "gamma": "3",
            **more,
        }
        with LLM(tinyworld_checkpoint, threads=1, num_kv_blocks=200, **options) as llm:
            assert [o.outputs for o in llm.generate(PROMPTS, greedy)] == [o.outputs for o in expected]
            before = llm.frontend.engine.scheduler.stats.accepted_tokens
            assert all(len(o.outputs[0].token_ids) == 40 for o in llm.generate(PROMPTS, sampled))
            assert llm.frontend.engine.scheduler.stats.accepted_tokens > before
            seen.add(llm.fingerprint)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"speculate": "medusa"}, "speculate='medusa' must be off, ngram, suffix or draft:PATH"),
        ({"speculate": "draft:"}, "must be off, ngram, suffix or draft:PATH"),
        ({"speculate": "ngram", "gamma": "0"}, "gamma='0' must be auto or a number from 1 to 16"),
        ({"speculate": "ngram", "gamma": "17"}, "gamma='17' must be auto or a number"),
        ({"gamma": "3"}, "gamma=3 acts with speculate only"),
        ({"verifier": "rejection"}, "verifier=rejection acts with speculate only"),
        ({"speculate": "ngram", "verifier": "typical"}, "verifier"),
        ({"speculate": "ngram", "lenience": 0.5}, "lenience=0.5 acts with verifier=rejection only"),
        ({"speculate": "ngram", "verifier": "rejection", "lenience": 0.0}, "lenience=0.0 must be above 0"),
        (
            {"speculate": "ngram", "verifier": "rejection", "lenience": 1.5},
            "lenience=1.5 must be above 0 and at most 1",
        ),
    ],
)
def test_options_that_make_no_sense_say_so(options, said):
    with pytest.raises(ConfigError) as caught:
        EngineOptions(**options)
    assert said in str(caught.value)


@pytest.fixture(scope="module")
def unfit(tinyworld_checkpoint, data_dir, tmp_path_factory):
    """(A folder that cannot draft for tinyworld, part of the error message) by what is wrong with it."""
    made = tmp_path_factory.mktemp("unfit")
    config = read_config(tinyworld_checkpoint)
    for name, layers in (("larger", 5), ("unreadable", config.num_layers)):
        save_model(random_model(replace(config, num_layers=layers), load_ops("reference"), 0), made / name)
        for file in tinyworld_checkpoint.glob("token*"):
            (made / name / file.name).write_bytes(file.read_bytes())
    (made / "unreadable" / "config.json").write_text("{")
    return {
        "tokenizer": (data_dir / "checkpoints" / "stories260K", "its tokenizer is another"),
        "larger": (made / "larger", "it is larger than the model"),
        "missing": (made / "missing", "missing is neither a folder"),
        "unreadable": (made / "unreadable", "config.json"),
    }


def loads_nothing(*args, **kwargs):
    raise AssertionError("weights are loaded")


@pytest.mark.parametrize("wrong", ["tokenizer", "larger", "missing", "unreadable"])
def test_a_draft_that_cannot_draft_is_refused_before_weights_are_loaded(
    wrong, unfit, tinyworld_checkpoint, other_checkpoint, monkeypatch
):
    for module in ("frontend", "speculation"):
        monkeypatch.setattr(f"headrace.llm.{module}.load_model", loads_nothing)
    monkeypatch.setattr("headrace.llm.frontend.Ranks.start", loads_nothing)
    path, said = unfit[wrong]
    with pytest.raises(HeadraceError, match=said) as caught:
        LLM(tinyworld_checkpoint, threads=1, num_kv_blocks=50, speculate=f"draft:{path}")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(AssertionError, match="weights are loaded"):
        LLM(tinyworld_checkpoint, threads=1, num_kv_blocks=50, speculate=f"draft:{other_checkpoint}")


def test_a_model_from_memory_refuses_a_draft_that_cannot_draft(unfit, tinyworld_checkpoint):
    ops = load_ops("cpu", threads=1)
    model, tokenizer = load_model(tinyworld_checkpoint, ops), Tokenizer.from_folder(tinyworld_checkpoint)
    for path, said in unfit.values():
        with pytest.raises(HeadraceError, match=said):
            LLM.from_model(model, tokenizer, ops, num_kv_blocks=50, speculate=f"draft:{path}")
    options: dict[str, Any] = {"num_kv_blocks": 50, "speculate": f"draft:{tinyworld_checkpoint}", "gamma": "3"}
    with LLM.from_model(model, tokenizer, ops, **options) as llm:
        params = SamplingParams(seed=3, max_tokens=30, ignore_eos=True)
        llm.generate(PROMPTS, params)
        stats = llm.frontend.engine.scheduler.stats
        assert stats.accepted_tokens == stats.drafted_tokens > 0


def test_a_choice_has_the_places_of_drafts_that_stand_in_it(tinyworld_checkpoint):
    tokenizer = Tokenizer.from_folder(tinyworld_checkpoint)
    a, b = (tokenizer.encode(text, add_special_tokens=False)[0] for text in "ab")
    choice = Choice(CompletionOutput(0), [], SamplingParams(stop=("b",)), tokenizer)
    out = choice.output
    choice.take(RequestUpdate(1, 1, [a, a, a], drafted=4, accepted=2))
    assert out.accepted == [0, 1]
    choice.take(RequestUpdate(1, 1, [a, a, a], drafted=2, accepted=1, drafts_at=1))
    assert out.accepted == [0, 1, 4]
    choice.take(RequestUpdate(1, 1, [a], drafted=3, accepted=3))
    assert out.accepted == [0, 1, 4, 6], "two of the drafts wait for their scores"
    assert choice.take(RequestUpdate(1, 1, [a, b, a], drafted=3, accepted=3)) == 9
    assert out.accepted == [0, 1, 4, 6, 7, 8] and out.token_ids == [*[a] * 8, b]


def test_places_of_drafts_are_those_in_the_whole_output_in_parts_and_records_too():
    output = RequestOutput("r", None, [1], [CompletionOutput(0, "abcd", [5, 6, 7, 8], accepted=[0, 2, 3])])
    [whole] = output.outputs
    first, later = replace(whole, token_ids=[5, 6], text="ab", accepted=[0]), whole.since(2, 2)
    assert (later.token_ids, later.accepted) == ([7, 8], [2, 3]) and whole.since(4, 4).accepted == []
    first.extend(later)
    assert first == whole and first.accepted == whole.accepted
    record = ResumeRecord(output, SamplingParams(seed=1), 0, CacheKey(), "")
    read = ResumeRecord.from_dict(json.loads(json.dumps(record.to_dict())))
    assert read.output.outputs[0].accepted == [0, 2, 3]
    assert output.snapshot().outputs[0].accepted is not whole.accepted
    assert whole == replace(whole, accepted=[]), "outputs are equal however they came"
