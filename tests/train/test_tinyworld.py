"""The world's texts: reproducible, solvable by their own rules, and the exam never seen in training."""

import json
import os
import re
import subprocess
import sys
from itertools import islice

import pytest

from headrace.errors import ConfigError
from headrace.train import tinyworld
from headrace.train.tinyworld import CATEGORIES, COLOURS, FRIEND, HOME, PEOPLE, PLACES, THINGS


@pytest.fixture(scope="module")
def texts():
    return list(islice(tinyworld.documents(0), 6000))


@pytest.fixture(scope="module")
def questions():
    return tinyworld.exam(0, 40 * len(CATEGORIES))


def plain(prompt: str) -> str:
    return prompt.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")


class Reader:
    """The world's rules written a second time: reads sentences, answers questions, notes combinations."""

    def __init__(self):
        self.place = self.holder = self.colour = None
        self.combination = {}

    def read(self, sentence: str) -> str | None:
        """The answer, where the sentence is a question."""
        person, *words = re.findall(r"\w+", sentence)
        match words:
            case ["is", "at", "the", place]:
                self.place, self.combination["place"] = place, ("moved", (person, place))
            case ["goes", "to", "the", place]:
                self.place, self.combination["place"] = place, ("moved", (person, place))
            case ["goes", "home"]:
                self.combination["place"] = ("home", ("home", person, self.place))
                self.place = HOME[person]
            case ["goes", way]:
                self.combination["place"] = ("walk", (person, self.place, way))
                self.place = PLACES[(PLACES.index(self.place) + {"east": 1, "west": 9}[way]) % 10]
            case ["finds", "a", colour, thing]:
                self.holder, self.colour, self.owner = person, colour, person
                self.combination["colour"] = ("colour", (person, thing, colour))
            case ["gives", "the", thing, "to", "a", "friend"]:
                self.holder, self.combination["holder"] = FRIEND[person], ("friend", ("friend", person, thing))
            case ["gives", "the", thing, "to", other]:
                self.holder, self.combination["holder"] = other, ("given", (person, other, thing))
            case ["is", subject]:
                return f"{subject} is at the {self.place}."
            case ["has", "the", thing]:
                return f"{self.holder} has the {thing}."
            case ["colour", "is", "the", thing]:
                return f"The {thing} is {self.colour}."
            case _:
                raise AssertionError(f"an unknown sentence: {sentence}")

    def answer(self, question: str) -> str:
        if match := re.fullmatch(r"What is (\d+)\+(\d+)\?", question):
            self.combination["sum"] = ("sum", tuple(sorted(match.groups())))
            return f"{match[1]}+{match[2]}={int(match[1]) + int(match[2])}"
        if question.startswith("Write as JSON: "):
            words = re.findall(r"\w+", question.removeprefix("Write as JSON: "))
            words = [word for word in words if word in PEOPLE + THINGS]
            if words[0] in THINGS:
                self.combination["list"] = ("list", tuple(sorted(words)))
                return json.dumps(words)
            pairs = dict(zip(words[::2], words[1::2]))
            self.combination["object"] = ("object", tuple(sorted(f"{k} {v}" for k, v in pairs.items())))
            return json.dumps(pairs)
        *told, asked = re.split(r"(?<=\.) ", question)
        # The place may be told after the thing is found, but always before anybody moves.
        for sentence in told:
            assert self.read(sentence) is None
        return self.read(asked)


def test_every_exam_question_has_its_answer_and_a_held_out_combination(questions):
    assert {category for category, _, _ in questions} == set(CATEGORIES)
    assert len({prompt for _, prompt, _ in questions}) == len(questions)
    for category, prompt, answer in questions:
        reader = Reader()
        assert reader.answer(plain(prompt)) == answer, prompt
        kind = {"moved": "place", "walk": "place", "home": "place", "given": "holder", "friend": "holder"}
        name, combination = reader.combination[kind.get(category, category)]
        assert name == category and tinyworld.held_out(combination), prompt


def test_training_is_true_and_shows_no_held_out_combination(texts):
    seen = set()
    for text in texts:
        if text.turns[0][0] == "":
            continue
        reader = Reader()
        for prompt, reply in text.turns:
            assert reader.answer(plain(prompt)) == reply, text
            for name, combination in reader.combination.values():
                seen.add(name)
                assert not tinyworld.held_out(combination), (prompt, combination)
    assert seen == set(CATEGORIES)


def test_stories_tell_what_is_always_so(texts):
    stories = [text.turns[0][1] for text in texts if text.turns[0][0] == ""]
    assert len(stories) > 300
    for story in stories:
        names = [word for word in re.findall(r"\w+", story) if word in PEOPLE]
        assert set(names) == {names[0], FRIEND[names[0]]}
        assert {word for word in re.findall(r"\w+", story) if word in PLACES} <= {HOME[name] for name in names}
        assert len({word for word in re.findall(r"\w+", story) if word in COLOURS}) == 1


def test_the_worlds_facts_are_one_to_one():
    for facts, values in ((HOME, PLACES), (FRIEND, PEOPLE), (tinyworld.FAVOURITE, THINGS)):
        assert sorted(facts) == sorted(PEOPLE) and sorted(facts.values()) == sorted(values)
    assert all(FRIEND[name] != name for name in PEOPLE)


def test_held_out_is_about_an_eighth():
    triples = [(a, b, c) for a in PEOPLE for b in THINGS for c in PLACES]
    assert sum(map(tinyworld.held_out, triples)) / len(triples) == pytest.approx(1 / 8, abs=0.04)


def test_the_same_seed_writes_the_same_world_in_any_process():
    code = ("from itertools import islice; from headrace.train import tinyworld as w;"
            "t = w.build_tokenizer(400, 3);"
            "print(list(islice(w.documents(3), 50)), w.exam(3, 9), w.prompts(8, 3),"
            " [t.token_text(i) for i in range(t.vocab_size)])")
    outs = {subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed},
                           capture_output=True, text=True, check=True).stdout for seed in ("1", "2")}
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
    assert tokenizer.apply_chat_template([{"role": "user", "content": plain(prompt)}]) == prompt
    with pytest.raises(ConfigError, match="260"):
        tinyworld.build_tokenizer(100, 0)


def test_accuracy_counts_by_category():
    answers = {prompt: answer for _, prompt, answer in tinyworld.exam(0, 18)}
    marks = tinyworld.accuracy(lambda prompts: [answers[p] + " " if "+" in p else "no" for p in prompts], 18)
    assert marks == {"overall": 2 / 18, **{name: float(name == "sum") for name in CATEGORIES}}


def test_prompts_are_different_and_of_mixed_lengths():
    prompts = tinyworld.prompts(32)
    tokenizer = tinyworld.build_tokenizer(512, 0)
    lengths = sorted(len(tokenizer.encode(prompt)) for prompt in prompts)
    assert len(prompts) == len(set(prompts)) == 32
    assert 1 <= lengths[0] < 10 and 128 < lengths[-1] < 400
