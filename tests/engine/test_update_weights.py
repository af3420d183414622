"""Other weights under a live engine: what comes after is theirs alone, whatever was cached or running."""

import pytest
import torch

from headrace import LLM, SamplingParams
from headrace.errors import CheckpointError, ConfigError
from headrace.kernels.ops import load_ops
from headrace.model.huggingface import load_model, save_model

PROMPT = "Once upon a time, Mia went to the garden, and there she found what Tom had lost. " * 2
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module")
def other(tinyworld_checkpoint, tmp_path_factory):
    """A checkpoint of the same shape with other weights, and the model."""
    model = load_model(tinyworld_checkpoint, load_ops("reference"))
    draw = torch.Generator().manual_seed(3)
    for _, piece in model.tensors():
        piece.tensor.add_(torch.empty(piece.tensor.shape).normal_(0, 0.03, generator=draw))
    folder = tmp_path_factory.mktemp("other") / "hf"
    save_model(model, folder)
    for file in tinyworld_checkpoint.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder, model


def sources(other):
    folder, model = other
    return {"folder": folder, "text": str(folder), "model": model,
            "tensors": {name: piece.tensor for name, piece in model.tensors()}}


@pytest.mark.parametrize("kind", ["folder", "text", "model", "tensors"])
def test_the_new_weights_answer_with_nothing_of_the_old(tinyworld_checkpoint, other, kind):
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
    for wrong, said in (({k: v for k, v in tensors.items() if k != name}, f"{name} is missing"),
                        ({**tensors, "extra": tensors[name]}, "extra is none of it"),
                        ({**tensors, name: torch.ones(3)}, f"{name} has shape")):
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
