"""Other weights in a running engine: later tokens are of the new weights, whatever was cached or running."""

import asyncio
import json
import shutil

import pytest
import torch

from headrace import LLM, AsyncLLM, SamplingParams
from headrace.cache.key import CacheKey
from headrace.engine.engine import EngineFailedError
from headrace.errors import CheckpointError, ConfigError
from headrace.kernels.load import load_ops
from headrace.llm.async_llm import EngineStoppedError
from headrace.model.huggingface import load_model

PROMPT = "Once upon a time, Mia went to the garden, and there she found what Tom had lost. " * 2
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module")
def other(other_checkpoint):
    """A checkpoint of the same shape with other weights, and the model."""
    return other_checkpoint, load_model(other_checkpoint, load_ops("reference"))


def sources(other):
    folder, model = other
    return {
        "folder": folder,
        "text": str(folder),
        "model": model,
        "tensors": {name: piece.tensor for name, piece in model.tensors()},
    }


@pytest.mark.parametrize("kind", ["folder", "text", "model", "tensors"])
def test_the_new_weights_use_no_cache_of_the_old(tinyworld_checkpoint, other, kind):
    llm = LLM(tinyworld_checkpoint)
    before = llm.generate(PROMPT, GREEDY)[0]
    expected = LLM(other[0]).generate(PROMPT, GREEDY)[0]
    assert before.weights_version == 0 and before.outputs != expected.outputs
    assert llm.update_weights(sources(other)[kind]) == 1
    after = llm.generate(PROMPT, GREEDY)[0]
    assert after.outputs == expected.outputs and after.weights_version == 1
    assert after.num_cached_tokens == 0 and llm.generate(PROMPT, GREEDY)[0].num_cached_tokens > 0
    assert llm.update_weights(tinyworld_checkpoint, version=40) == 40
    again = llm.generate(PROMPT, GREEDY)[0]
    assert again.outputs == before.outputs and again.weights_version == 40
    llm.frontend.engine.scheduler.check_integrity()


@pytest.mark.parametrize("options", [{}, {"queue_depth": 2}, {"preemption": "swap", "num_kv_blocks": 24}])
def test_a_running_request_goes_on_under_the_new_weights(tinyworld_checkpoint, other, options):
    llm = LLM(tinyworld_checkpoint, **options)
    seen = []
    for output in llm.stream(PROMPT, GREEDY):
        seen = list(output.outputs[0].token_ids)
        if len(seen) == 8:
            llm.update_weights(other[0])
            break
    llm.frontend.engine.scheduler.check_integrity()
    name = llm.frontend.add(PROMPT, GREEDY)
    while len(llm.frontend.group(name).output.outputs[0].token_ids) < 5:
        llm.frontend.step()
    llm.update_weights(tinyworld_checkpoint)
    group = llm.frontend.group(name)
    known = list(group.output.outputs[0].token_ids)
    while llm.frontend.has_work:
        llm.frontend.step()
        llm.frontend.engine.scheduler.check_integrity()
    assert group.output.weights_version == 2
    done = group.output.outputs[0].token_ids
    ids = llm.tokenizer.encode(PROMPT) + known
    rest = SamplingParams(temperature=0.0, max_tokens=24 - len(known), ignore_eos=True)
    fresh = LLM(tinyworld_checkpoint).generate({"prompt_token_ids": ids}, rest)[0].outputs[0].token_ids
    assert done[: len(known)] == known and done[len(known) :] == fresh and len(seen) == 8


def test_what_does_not_fit_changes_nothing(tinyworld_checkpoint, other, tmp_path):
    llm = LLM(tinyworld_checkpoint)
    before = llm.generate(PROMPT, GREEDY)[0]
    tensors = sources(other)["tensors"]
    name = "model.norm.weight"
    for wrong, said in (
        ({k: v for k, v in tensors.items() if k != name}, f"{name} is missing"),
        ({**tensors, "extra": tensors[name]}, "extra is not in the model"),
        ({**tensors, name: torch.ones(3)}, f"{name} has shape"),
    ):
        with pytest.raises(CheckpointError, match=said):
            llm.update_weights(wrong)
    with pytest.raises(CheckpointError):
        llm.update_weights(tmp_path)
    after = llm.generate(PROMPT, GREEDY)[0]
    assert after.outputs == before.outputs and after.weights_version == 0


def test_every_rank_changes(tinyworld_checkpoint, other):
    expected = LLM(other[0]).generate(PROMPT, GREEDY)[0].outputs
    with LLM(tinyworld_checkpoint, tensor_parallel_size=2) as llm:
        llm.generate(PROMPT, GREEDY)
        with pytest.raises(ConfigError, match="come from a checkpoint folder"):
            llm.update_weights(other[1])
        llm.update_weights(other[0])
        assert llm.generate(PROMPT, GREEDY)[0].outputs == expected


def test_a_folder_of_another_model_is_refused_though_its_tensors_fit(tinyworld_checkpoint, other, tmp_path):
    shutil.copytree(other[0], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    llm = LLM(tinyworld_checkpoint)
    with pytest.raises(CheckpointError, match=r"rms_norm_eps 0\.5, and the running model's is"):
        llm.update_weights(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").unlink()
    assert llm.update_weights(tmp_path / "hf") == 1


def test_a_failure_while_weights_load_ends_the_engine(tinyworld_checkpoint, other, monkeypatch):
    llm = LLM(tinyworld_checkpoint)

    def fails(model, folder):
        raise CheckpointError("the disk is gone")

    monkeypatch.setattr("headrace.engine.run.runner.load_weights", fails)
    with pytest.raises(RuntimeError, match=r"was read only in part.*the disk is gone"):
        llm.update_weights(other[0])
    with pytest.raises(EngineFailedError):
        llm.generate(PROMPT, GREEDY)


def test_results_in_flight_come_with_the_next_step(tinyworld_checkpoint, other):
    llm = LLM(tinyworld_checkpoint, queue_depth=2)
    two = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    expected = llm.generate(PROMPT, two)[0].outputs
    group = llm.frontend.group(llm.frontend.add(PROMPT, two))
    assert llm.frontend.step() == [group] and not group.output.finished
    llm.update_weights(other[0])
    assert group.output.finished and llm.frontend.has_work, "its last token was computed already"
    assert llm.frontend.step() == [group] and not llm.frontend.has_work
    assert group.output.outputs == expected and group.output.weights_version == 0


def test_a_salt_stays_with_a_request_that_is_resumed_and_then_updated(tinyworld_checkpoint, other):
    llm = LLM(tinyworld_checkpoint)
    llm.update_weights(tinyworld_checkpoint, version=7)
    name = llm.frontend.add(PROMPT, GREEDY, cache_key=CacheKey(salt="salt"))
    llm.frontend.step()
    record = llm.frontend.resume_record(name)
    assert record.cache_key == CacheKey(salt="salt")
    second = LLM(tinyworld_checkpoint)
    second.update_weights(tinyworld_checkpoint, version=9)
    [number] = second.frontend.group(second.frontend.resume(record)).choices
    request = second.frontend.engine.scheduler.requests[number]
    assert request.cache_key == request.kv.cache_key == CacheKey(9, None, "salt")
    second.update_weights(other[0])
    assert request.cache_key == request.kv.cache_key == CacheKey(10, None, "salt")
    second.frontend.abort(name)
    llm.frontend.abort(name)


def test_an_engine_on_a_thread_changes_between_two_steps(tinyworld_checkpoint, other):
    expected = LLM(other[0]).generate(PROMPT, GREEDY)[0].outputs

    async def scenario():
        async with AsyncLLM(tinyworld_checkpoint) as llm:
            versions = []
            async for output in llm.stream(PROMPT, GREEDY):
                versions.append(output.weights_version)
                if len(versions) == 5:
                    assert await llm.update_weights(other[0]) == 1
            with pytest.raises(CheckpointError):
                await llm.update_weights("no/such/folder/here")
            assert (await llm.generate(PROMPT, GREEDY)).outputs == expected
        with pytest.raises(EngineStoppedError):
            await llm.update_weights(other[0])
        return versions

    versions = asyncio.run(scenario())
    assert versions == sorted(versions) and versions[:5] == [0] * 5 and versions[-1] == 1 and len(versions) == 24
