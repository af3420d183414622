"""Tinyworld: a small made-up world, written down by a seed.

Some people, places and coloured things; who is where and who has what. About it there are little stories,
questions in chat format (some need two facts joined, or the last of several moves), small sums, and lists to be
turned into JSON. What a question is about is its *combination*: (person, thing, place), the two summands, the
set of list items. A hash says which combinations are held out: training never shows one, the exam asks nothing else.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from headrace.config import require
from headrace.text.tokenizer import Tokenizer

__all__ = [
    "CATEGORIES",
    "Document",
    "Question",
    "accuracy",
    "build_tokenizer",
    "documents",
    "exam",
    "grade",
    "held_out",
    "prompts",
]

PEOPLE = ("Ada", "Ben", "Finn", "Lily", "Max", "Mia", "Nora", "Otto", "Rosa", "Tom")
PLACES = ("barn", "bridge", "cave", "forest", "garden", "market", "mill", "river", "tower", "well")
THINGS = ("ball", "bell", "book", "coin", "cup", "drum", "hat", "key", "kite", "lamp")
COLOURS = ("black", "blue", "green", "red", "white", "yellow")
CATEGORIES = ("where", "who", "colour", "find", "moved", "given", "sum", "list", "object", "repeat")

SHARES = (1, 1, 1, 2, 2, 2, 4, 1, 1, 1)
EASY_SHARES = (4, 2, 1, 1, 0, 0, 4, 2, 2, 12)
"""How often training asks of each category."""

ASKED = ("where", "who", "colour", "find")
"""What further turns about a scene ask."""

MOST_TURNS = 10
EASY_TEXTS = 1500
"""Training begins with so many texts of the easier kinds."""

HELD_OUT_ONE_IN = 8
"""One combination in so many is kept for the exam."""


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' + message.role + ' is not one of system, user, assistant') }}{% endif %}"
    "{{ '<|' + message.role + '|>' + message.content + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
SPECIAL_TOKENS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


@dataclass(frozen=True, slots=True)
class Document:
    """One training text, in turns of (prompt, reply). Replies, and the end token after each, count in the loss.

    A text that counts as a whole is one turn with an empty prompt.
    """

    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its one right answer, and the combination it is about."""

    category: str
    question: str
    answer: str
    combination: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The question as the chat template writes it, up to where the reply begins."""
        return f"<|user|>{self.question}<|end|><|assistant|>"


@dataclass(frozen=True, slots=True)
class _Fact:
    person: str
    place: str
    thing: str
    colour: str

    @property
    def combination(self) -> tuple[str, ...]:
        return self.person, self.thing, self.place


def held_out(combination: tuple[str, ...]) -> bool:
    """Whether a combination belongs to the exam."""
    return zlib.crc32("|".join(combination).encode()) % HELD_OUT_ONE_IN == 0


def _scene(rng: random.Random, size: int, exam: bool) -> list[_Fact]:
    """`size` people in different places with different things. In an exam the first's is held out."""
    while True:
        columns = [rng.sample(pool, size) for pool in (PEOPLE, PLACES, THINGS)]
        facts = [_Fact(person, place, thing, rng.choice(COLOURS)) for person, place, thing in zip(*columns)]
        outside = [held_out(fact.combination) for fact in facts]
        if outside[0] if exam else not any(outside):
            return facts


def _about_scene(rng: random.Random, category: str, exam: bool, turns: int, easy: bool) -> list[Question]:
    """A scene and different questions about it; the first is of `category` and about the first person."""
    facts = _scene(rng, 3 if easy else rng.choice((2, 3)), exam)
    asked = facts[0]
    told: list[str] = []
    for fact in rng.sample(facts, len(facts)):
        told += _tell(rng, fact, category if fact is asked else rng.choice((category, "where")), facts)
    if category == "repeat":
        text = " ".join(told)
        return [Question(category, f"Repeat: {text}", text, asked.combination)]
    questions = [_ask(category, asked)]
    more = [(name, fact) for name in ASKED for fact in facts if (name, fact) != (category, asked)]
    chosen = rng.choices(more, k=turns - 1) if easy else rng.sample(more, min(turns - 1, len(more)))
    questions += [_ask(name, fact) for name, fact in chosen]
    questions[0] = replace(questions[0], question=" ".join([*told, questions[0].question]))
    return questions


def _ask(category: str, asked: _Fact) -> Question:
    question, answer = {
        "where": (f"Where is {asked.person}?", f"{asked.person} is at the {asked.place}."),
        "moved": (f"Where is {asked.person}?", f"{asked.person} is at the {asked.place}."),
        "who": (f"Who has the {asked.thing}?", f"{asked.person} has the {asked.thing}."),
        "given": (f"Who has the {asked.thing}?", f"{asked.person} has the {asked.thing}."),
        "colour": (f"What colour is the {asked.thing}?", f"The {asked.thing} is {asked.colour}."),
        "find": (f"Where is the {asked.thing}?", f"The {asked.thing} is at the {asked.place}."),
    }[category]
    return Question(category, question, answer, asked.combination)


def _tell(rng: random.Random, fact: _Fact, category: str, facts: list[_Fact]) -> list[str]:
    """Sentences after which `fact` holds. They may begin with how it was before."""
    where = [f"{fact.person} is at the {fact.place}."]
    has = [f"{fact.person} has a {fact.colour} {fact.thing}."]
    if category == "moved":
        before = rng.choice([place for place in PLACES if place != fact.place])
        where = [f"{fact.person} is at the {before}.", f"{fact.person} goes to the {fact.place}."]
    if category == "given":
        giver = rng.choice([other.person for other in facts if other is not fact])
        has = [f"{giver} finds a {fact.colour} {fact.thing}.", f"{giver} gives it to {fact.person}."]
    if category in ("moved", "given"):
        return [*where, *has] if rng.random() < 0.5 else [*has, *where]
    return [f"{fact.person} is at the {fact.place} with a {fact.colour} {fact.thing}."]


def _sum(rng: random.Random, exam: bool) -> Question:
    while True:
        a, b = rng.randrange(100), rng.randrange(10)
        if rng.random() < 0.3:
            a = rng.randrange(10)
        if rng.random() < 0.5:
            a, b = b, a
        combination = tuple(sorted((str(a), str(b))))
        if held_out(combination) == exam:
            return Question("sum", f"What is {a}+{b}?", f"{a}+{b}={a + b}", combination)


def _article(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _list(rng: random.Random, exam: bool) -> Question:
    while True:
        things = rng.sample(THINGS, rng.choice((2, 3, 4)))
        combination = tuple(sorted(things))
        if held_out(combination) == exam:
            return Question("list", f"Write as JSON: {_article(things)}.", json.dumps(things), combination)


def _object(rng: random.Random, exam: bool) -> Question:
    while True:
        people = rng.sample(PEOPLE, rng.choice((2, 3)))
        things = dict(zip(people, rng.sample(THINGS, len(people))))
        combination = tuple(sorted(f"{person} {thing}" for person, thing in things.items()))
        if held_out(combination) == exam:
            told = _article([f"{person} has the {thing}" for person, thing in things.items()])
            return Question("object", f"Write as JSON: {told}.", json.dumps(things), combination)


def _questions(rng: random.Random, category: str, exam: bool, turns: int = 1,
               easy: bool = False) -> list[Question]:
    alone = {"sum": _sum, "list": _list, "object": _object}
    if category in alone:
        return [alone[category](rng, exam) for _ in range(turns)]
    return _about_scene(rng, category, exam, turns, easy)


def _story(rng: random.Random) -> str:
    """A little story in which two people meet and a thing changes hands."""
    while True:
        first, second = _scene(rng, 2, exam=False)
        swapped = [(first.person, second.thing, first.place), (second.person, first.thing, second.place)]
        if not any(held_out(combination) for combination in swapped):
            break
    who, other, thing, colour = first.person, second.person, first.thing, first.colour
    opening = rng.choice((
        f"Once upon a time, {who} lived at the {first.place}.",
        f"Once upon a time, there was a child called {who}, who lived at the {first.place}.",
        f"{who} lived at the {first.place}."))
    wish = rng.choice((
        f"{who} had a {colour} {thing} and liked it very much.",
        f"One day {who} found a {colour} {thing}.",
        f"{who} was looking for a {colour} {thing}, and found it at the {second.place}."))
    meeting = rng.choice((
        f"{who} went to the {second.place} and met {other}.",
        f"{other} came from the {second.place} to see {who}.",
        f"At the {second.place}, {who} met {other}."))
    talk = rng.choice((
        f'"What a nice {thing}," said {other}. "It is {colour}!"',
        f'"May I have the {thing}?" said {other}.',
        f'"I like your {colour} {thing}," said {other}.'))
    turn = rng.choice((
        f"So {who} gave the {thing} to {other}.",
        f"{who} said yes, and they played with the {thing} all day.",
        f"{who} gave the {thing} to {other}, and {other} gave {who} a {second.colour} {second.thing}."))
    end = rng.choice((
        f"Then {who} went home to the {first.place} and was happy.",
        "They were good friends ever after.",
        f"In the evening {other} went home to the {second.place}."))
    return " ".join((opening, wish, meeting, talk, turn, end))


def documents(seed: int) -> Iterator[Document]:
    """An endless stream of training texts; no held-out combination is in it."""
    rng = random.Random(f"tinyworld {seed}")
    for index in count():
        easy = index < EASY_TEXTS
        if rng.random() < 0.1:
            yield Document((("", _story(rng)),))
        else:
            category = rng.choices(CATEGORIES, EASY_SHARES if easy else SHARES)[0]
            turns = rng.randint(MOST_TURNS // 2 if easy else 1, MOST_TURNS)
            questions = _questions(rng, category, exam=False, turns=turns, easy=easy)
            yield Document(tuple((question.prompt, question.answer) for question in questions))


def build_tokenizer(vocab_size: int, seed: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, learnt from 4,000 training texts.

    Digits are single tokens; `<|end|>` ends a text and a turn. Equal arguments give equal tokenizers.
    """
    require(vocab_size >= 256 + len(SPECIAL_TOKENS),
            f"data.vocab_size={vocab_size} must be at least {256 + len(SPECIAL_TOKENS)}: "
            "one token for every byte, and the special ones")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    texts = islice(documents(seed), 4000)
    backend.train_from_iterator((part for text in texts for turn in text.turns for part in turn), trainer)
    return Tokenizer(backend, {"eos_token": SPECIAL_TOKENS[0]}, CHAT_TEMPLATE, source="tinyworld")


def exam(seed: int, n: int) -> list[tuple[str, str, str]]:
    """`n` different held-out questions: (category, prompt, right answer), categories in turn."""
    rng = random.Random(f"tinyworld exam {seed}")
    asked: dict[str, tuple[str, str, str]] = {}
    while len(asked) < n:
        (question,) = _questions(rng, CATEGORIES[len(asked) % len(CATEGORIES)], exam=True)
        asked.setdefault(question.prompt, (question.category, question.prompt, question.answer))
    return list(asked.values())


def grade(expected: str, reply: str) -> bool:
    """Whether a reply is the right answer, to the character."""
    return reply.strip() == expected


def accuracy(generate: Callable[[list[str]], list[str]], n: int, seed: int = 0) -> dict[str, float]:
    """Share of right replies to `n` held-out questions, by category and "overall".

    `generate` maps prompts to replies, all at once so that it may batch them.
    """
    questions = exam(seed, n)
    replies = generate([prompt for _, prompt, _ in questions])
    right: dict[str, list[bool]] = {}
    for (category, _, answer), reply in zip(questions, replies, strict=True):
        for name in (category, "overall"):
            right.setdefault(name, []).append(grade(answer, reply))
    return {name: sum(marks) / len(marks) for name, marks in right.items()}


def prompts(n: int, seed: int = 0) -> list[str]:
    """`n` raw prompts of mixed lengths: openings of stories, questions, whole stories before a question."""
    rng = random.Random(f"tinyworld prompts {seed}")
    texts = []
    for i in range(n):
        words = _story(rng).split(" ")
        question = _questions(rng, rng.choice(CATEGORIES), exam=True)[0].prompt
        texts.append((
            " ".join(words[: rng.randint(1, 8)]),
            question,
            " ".join(words[: rng.randint(9, len(words))]),
            "".join(_story(rng) + "<|end|>" for _ in range(rng.randint(1, 3))) + question,
        )[i % 4])
    return texts
