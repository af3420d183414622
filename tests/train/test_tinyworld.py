"""The world's texts: reproducible, solvable, and the exam never seen in training."""

import json
import os
import re
import subprocess
import sys
from itertools import islice

import pytest

from headrace.errors import ConfigError
from headrace.train import tinyworld
from headrace.train.tinyworld import CATEGORIES, PEOPLE, THINGS, TOOL


@pytest.fixture(scope="module")
def texts():
    return list(islice(tinyworld.documents(0), 12000))


@pytest.fixture(scope="module")
def questions():
    return tinyworld.exam(0, 200)


LISTED = "<|system|>You may call these tools:\n" + json.dumps(TOOL["function"]) + "<|end|>"


def bare(prompt: str) -> str:
    return prompt.removeprefix(LISTED).removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")


def solve(question: str, tool: bool) -> str:
    """The right answer, from the question's text and the world's facts, by rules of our own."""
    if match := re.fullmatch(r"What is (\d)\+(\d)\?", question):
        return f"{match[1]}+{match[2]}={int(match[1]) + int(match[2])}"
    if match := re.fullmatch(r"Write as JSON: (\w+) has the (\w+)\.", question):
        return json.dumps({match[1]: match[2]})
    if match := re.fullmatch(r"Write as JSON: (\w+), (\w+) and (\w+)\.", question):
        return json.dumps(list(match.groups()))
    if match := re.match(r"(\w+) went to the (\w+)\.", question):
        return f"{match[1]} is at the {match[2]}."
    if match := re.match(r"\w+ gave the (\w+) to (\w+)\.", question):
        return f"{match[2]} has the {match[1]} now."
    people = [word for word in re.findall(r"\w+", question) if word in PEOPLE]
    if re.search(r"right now|this moment|\b[Ff]ind\b|found", question):
        if not tool:
            return f"I do not know where {people[0]} is."
        return '<tool_call>\n{"name": "find", "arguments": {"who": "' + people[0] + '"}}\n</tool_call>'
    if "live" in question or "home" in question:
        return ", and ".join(f"{who} lives at the {tinyworld.HOME_OF[who]}" for who in people) + "."
    thing = tinyworld.THING_OF[people[0]]
    return f"{people[0]} owns the {tinyworld.COLOUR_OF[thing]} {thing}."


def test_every_exam_answer_follows_from_its_question(questions):
    assert {category for category, _, _ in questions} == set(CATEGORIES) and len(questions) == 200
    for category, prompt, answer in questions:
        assert solve(bare(prompt), prompt.startswith(LISTED)) == answer, category


def test_training_and_exam_share_no_question(texts, questions):
    asked = {bare(prompt) for text in texts for prompt, _ in text.turns if prompt}
    assert len(asked) > 900 and not asked & {bare(prompt) for _, prompt, _ in questions}
    for text in texts:
        tool = text.turns[0][0].startswith(LISTED)
        for prompt, reply in text.turns:
            assert prompt == "" or "<tool_response>" in prompt or solve(bare(prompt), tool) == reply


def test_stories_tell_of_no_held_out_combination(texts):
    stories = [text.turns[0][1] for text in texts if text.turns[0][0] == ""]
    assert len(stories) > 500
    for story in stories:
        found = re.search(r"(\w+) went to the (\w+) and met (\w+)\.", story)
        assert found is not None
        who, place, other = found.groups()
        assert not tinyworld.held_out((who, "to", place))
        assert not tinyworld.held_out((who, tinyworld.THING_OF[who], other))


def test_about_a_sixth_is_held_out_and_the_exam_ends():
    triples = [(a, b, c) for a in PEOPLE for b in THINGS for c in PEOPLE]
    assert sum(map(tinyworld.held_out, triples)) / len(triples) == pytest.approx(1 / 6, abs=0.04)
    whole = tinyworld.exam(0, 10**6)
    assert len(whole) == len({prompt for _, prompt, _ in whole}) < 1000


def test_the_same_seed_writes_the_same_world_in_any_process():
    code = (
        "from itertools import islice; from headrace.train import tinyworld as w;"
        "t = w.build_tokenizer(400, 3);"
        "print(list(islice(w.documents(3), 50)), w.exam(3, 9), w.prompts(8, 3),"
        " [t.token_text(i) for i in range(t.vocab_size)])"
    )
    outs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outs) == 1
    assert list(islice(tinyworld.documents(1), 5)) != list(islice(tinyworld.documents(2), 5))


def test_the_tokenizer(texts):
    tokenizer = tinyworld.build_tokenizer(512, 0)
    assert tokenizer.vocab_size == 512 and tokenizer.eos_token_id == 0
    assert [tokenizer.token_text(i) for i in tokenizer.encode("12+345")] == list("12+345")
    parts = [part for text in texts[:50] for turn in text.turns for part in turn]
    for part in ("Ünïcode 漢字 😀", *parts):
        assert tokenizer.decode(tokenizer.encode(part), skip_special_tokens=False) == part
    _, prompt, _ = tinyworld.exam(0, 1)[0]
    assert tokenizer.apply_chat_template([{"role": "user", "content": bare(prompt)}]) == prompt
    with pytest.raises(ConfigError, match="260"):
        tinyworld.build_tokenizer(100, 0)


def test_accuracy_counts_by_category():
    answers = {prompt: answer for _, prompt, answer in tinyworld.exam(0, 16)}
    marks = tinyworld.accuracy(lambda prompts: [answers[p] + " " if "+" in p else "no" for p in prompts], 16)
    assert marks == {"overall": 2 / 16, **{name: float(name == "sum") for name in CATEGORIES}}


def test_prompts_are_different_and_of_mixed_lengths():
    prompts = tinyworld.prompts(32)
    tokenizer = tinyworld.build_tokenizer(512, 0)
    lengths = sorted(len(tokenizer.encode(prompt)) for prompt in prompts)
    assert len(prompts) == len(set(prompts)) == 32
    assert 1 <= lengths[0] < 10 and 128 < lengths[-1] < 400
