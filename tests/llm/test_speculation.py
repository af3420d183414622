"""Speculation as users turn it on: the same answers, and options that say what is wrong."""

from dataclasses import replace
from typing import Any

import pytest

from headrace import LLM, SamplingParams
from headrace.bench.models import random_model
from headrace.errors import ConfigError, RequestError
from headrace.kernels.load import load_ops
from headrace.llm.options import EngineOptions
from headrace.model.folder import read_config
from headrace.model.huggingface import save_model

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


def test_a_draft_that_cannot_draft_is_refused(tinyworld_checkpoint, data_dir, tmp_path):
    larger = tmp_path / "larger"
    config = replace(read_config(tinyworld_checkpoint), num_layers=5)
    save_model(random_model(config, load_ops("reference"), 0), larger)
    for file in tinyworld_checkpoint.glob("token*"):
        (larger / file.name).write_bytes(file.read_bytes())
    stories = data_dir / "checkpoints" / "stories260K"
    for path, said in (
        (stories, "its tokenizer is another"),
        (larger, "it is larger than the model"),
        (tmp_path / "missing", "missing"),
    ):
        with pytest.raises(Exception, match=said) as caught:
            LLM(tinyworld_checkpoint, threads=1, num_kv_blocks=50, speculate=f"draft:{path}")
        assert caught.value.__class__.__module__ == "headrace.errors" and "\n" not in str(caught.value)
