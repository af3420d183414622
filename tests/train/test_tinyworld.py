"""The world's texts: reproducible, solvable, and the exam never seen in training."""

import json
import re
import subprocess
import sys
from itertools import islice, permutations

import pytest

from headrace.errors import ConfigError
from headrace.train import tinyworld
from headrace.train.tinyworld import CATEGORIES, PEOPLE, PLACES, THINGS


@pytest.fixture(scope="module")
def texts():
    return list(islice(tinyworld.documents(0), 12000))


@pytest.fixture(scope="module")
def questions():
    return tinyworld.exam(0, 45 * len(CATEGORIES))


def final_facts(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Who is where, and who has what, at the end of a scene's sentences: read by rules of our own."""
    place, owner = {}, {}
    last = ""
    for sentence in re.split(r"(?<=[.?]) ", text):
        if match := re.fullmatch(r"(\w+) (?:is at|goes to) the (\w+)\.", sentence):
            place[match[1]] = match[2]
        elif match := re.fullmatch(r"(\w+) (?:has|finds) a (\w+) (\w+)\.", sentence):
            owner[match[3]], last = match[1], match[3]
        elif match := re.fullmatch(r"(\w+) gives it to (\w+)\.", sentence):
            owner[last] = match[2]
    return place, owner


def solve(question: str) -> str:
    """The right answer, found from the question's text alone."""
    if match := re.search(r"What is (\d+)\+(\d+)\?", question):
        return f"{match[1]}+{match[2]}={int(match[1]) + int(match[2])}"
    if "JSON" in question:
        pairs = re.findall(r"(\w+) has the (\w+)", question)
        return json.dumps(dict(pairs) if pairs else re.findall(r"[a-z]{2,}", question.split(":")[1].replace(
            " and ", " ")))
    place, owner = final_facts(question)
    if match := re.search(r"Where is (?:the )?(\w+)\?", question):
        name = match[1]
        subject = f"The {name}" if name in owner else name
        return f"{subject} is at the {place[owner.get(name, name)]}."
    if match := re.search(r"Who has the (\w+)\?", question):
        return f"{owner[match[1]]} has the {match[1]}."
    match = re.search(r"What colour is the (\w+)\?", question)
    return f"The {match[1]} is {re.search(rf'a (.....?.?) {match[1]}', question)[1].split()[-1]}."


def combination(category: str, prompt: str, answer: str) -> tuple[str, ...]:
    """What an exam question is about, from its text alone."""
    question = prompt.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")
    if category == "sum":
        return tuple(sorted(re.match(r"(\d+)\+(\d+)", answer).groups()))
    if category in ("list", "object"):
        value = json.loads(answer)
        return tuple(sorted(value if category == "list" else (f"{k} {v}" for k, v in value.items())))
    place, owner = final_facts(question)
    things = {person: thing for thing, person in owner.items()}
    asked = re.findall(r"(\w+)\?", question)[-1]
    person = owner.get(asked, asked)
    return person, asked if asked in owner else things[person], place[person]


def test_every_exam_answer_follows_from_its_question(questions):
    for category, prompt, answer in questions:
        assert solve(prompt.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")) == answer, category


def test_every_exam_question_is_about_a_held_out_combination(questions):
    assert {category for category, _, _ in questions} == set(CATEGORIES)
    assert len({prompt for _, prompt, _ in questions}) == len(questions)
    for category, prompt, answer in questions:
        assert tinyworld.held_out(combination(category, prompt, answer)), (category, prompt)


def test_training_shows_no_held_out_combination(texts):
    kinds = set()
    for text in texts:
        scene = text.turns[0][0]
        place, owner = final_facts(scene.removeprefix("<|user|>"))
        for thing, person in owner.items():
            kinds.add("scene")
            assert not tinyworld.held_out((person, thing, place[person])), scene
        for _, reply in text.turns:
            if match := re.fullmatch(r"(\d+)\+(\d+)=\d+", reply):
                kinds.add("sum")
                assert not tinyworld.held_out(tuple(sorted(match.groups())))
            elif reply[0] in "[{":
                kinds.add(reply[0])
                category = "list" if reply[0] == "[" else "object"
                assert not tinyworld.held_out(combination(category, "", reply))
    assert kinds == {"scene", "sum", "[", "{"}


def test_stories_give_nothing_away(texts):
    stories = [text.turns[0][1] for text in texts if text.turns[0][0] == ""]
    assert len(stories) > 500
    for story in stories:
        people = [name for name in PEOPLE if name in story]
        places = [name for name in PLACES if name in story]
        things = [name for name in THINGS if re.search(rf"\b{name}\b", story)]
        first, second = sorted(people, key=story.index) if len(people) == 2 else (people[0], None)
        home = min(places, key=story.index)
        for thing in things[:1] if len(things) == 1 else ():
            assert not tinyworld.held_out((first, thing, home))
        if second and len(things) == 2 and "gave the" in story:
            given = re.search(r"gave the (\w+)", story)[1]
            away = next(place for place in places if place != home) if len(places) == 2 else None
            assert away is None or not tinyworld.held_out((second, given, away))


def test_held_out_is_an_eighth():
    triples = [(a, b, c) for a in PEOPLE for b in THINGS for c in PLACES]
    assert sum(map(tinyworld.held_out, triples)) / len(triples) == pytest.approx(1 / 8, abs=0.04)
    assert any(tinyworld.held_out(tuple(sorted(pair))) for pair in permutations(THINGS, 2))


def test_the_same_seed_writes_the_same_world_in_any_process():
    code = ("from itertools import islice; from headrace.train import tinyworld as w;"
            "t = w.build_tokenizer(400, 3);"
            "print(list(islice(w.documents(3), 50)), w.exam(3, 9), w.prompts(8, 3),"
            " [t.token_text(i) for i in range(t.vocab_size)])")
    outs = {subprocess.run([sys.executable, "-c", code], env={**__import__("os").environ, "PYTHONHASHSEED": seed},
                           capture_output=True, text=True, check=True).stdout for seed in ("1", "2")}
    assert len(outs) == 1
    assert list(islice(tinyworld.documents(1), 5)) != list(islice(tinyworld.documents(2), 5))


def test_the_tokenizer(texts):
    tokenizer = tinyworld.build_tokenizer(512, 0)
    assert tokenizer.vocab_size <= 512 and tokenizer.eos_token_id == 0
    assert [tokenizer.token_text(i) for i in tokenizer.encode("12+345")] == list("12+345")
    for part in ("Ünïcode 漢字 😀", *(part for text in texts[:50] for turn in text.turns for part in turn)):
        assert tokenizer.decode(tokenizer.encode(part), skip_special_tokens=False) == part
    (_, prompt, _), *_ = tinyworld.exam(0, 1)
    question = prompt.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": question}]) == prompt
    with pytest.raises(ConfigError, match="260"):
        tinyworld.build_tokenizer(100, 0)


def test_accuracy_counts_by_category():
    answers = {prompt: answer for _, prompt, answer in tinyworld.exam(0, 18)}
    marks = tinyworld.accuracy(lambda prompts: [answers[p] + " " if "+" in p else "no" for p in prompts], 18)
    assert marks == {"overall": 2 / 18, **{name: float(name == "sum") for name in CATEGORIES}}


def test_prompts_are_of_mixed_lengths_and_without_special_surprises():
    prompts = tinyworld.prompts(32)
    tokenizer = tinyworld.build_tokenizer(512, 0)
    lengths = sorted(len(tokenizer.encode(prompt)) for prompt in prompts)
    assert len(prompts) == len(set(prompts)) == 32
    assert lengths[0] >= 1 and lengths[0] < 10 and 128 < lengths[-1] < 400
