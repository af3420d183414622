"""Tinyworld: generated training texts about a small fixed world, and an exam on them.

Ten people have a home and a thing each, always the same. The texts are stories about them, questions in chat format
(about the world, and about something just told), small sums, and lists to write as JSON. In some texts there is a tool
that tells where a person is at the moment, which is unknown otherwise: there, a question about that is answered with a
call and then with what the tool has said, and other questions as ever.

Every question has a *combination*: the person and the wording, two people, a person and a place, giver, thing and
taker, two summands, the items in order. A hash selects the held-out combinations: they are in no training text, and
the exam asks only about them. So the exam tests whether the model combines what it has learnt, not whether it repeats
what it has seen.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

from headrace.text.chat import ChatTemplate
from headrace.text.tokenizer import Tokenizer
from headrace.train.corpus.bpe import CHAT_TEMPLATE, learn_tokenizer

__all__ = [
    "CATEGORIES",
    "TOOL",
    "Document",
    "Question",
    "accuracy",
    "build_tokenizer",
    "documents",
    "exam",
    "grade",
    "held_out",
    "held_out_question",
    "prompts",
]

PEOPLE = ("Ada", "Ben", "Finn", "Lily", "Max", "Mia", "Nora", "Otto", "Rosa", "Tom")
PLACES = ("barn", "bridge", "cave", "forest", "garden", "market", "mill", "river", "tower", "well")
THINGS = ("ball", "bell", "book", "coin", "cup", "drum", "hat", "key", "kite", "lamp")
COLOURS = ("black", "blue", "green", "red", "white", "yellow")
TOLD = ("home", "owns", "pair", "trip", "gift", "sum", "list", "object")
"""The categories of questions that can be answered without the tool."""
CATEGORIES = (*TOLD, "tool", "unknown")
"""The last two ask where a person is at the moment, with the tool and without it."""

HOME_OF = dict(zip(PEOPLE, PLACES[3:] + PLACES[:3]))
THING_OF = dict(zip(PEOPLE, THINGS[7:] + THINGS[:7]))
COLOUR_OF = dict(zip(THINGS, (COLOURS * 2)[: len(THINGS)]))
"""The facts of the world."""

WHERE = (
    "Where does {} live?",
    "Where is {} at home?",
    "Where is the home of {}?",
    "In which place does {} live?",
    "Tell me where {} lives.",
    "Do you know where {} lives?",
)
WHAT = (
    "What does {} own?",
    "Which thing belongs to {}?",
    "What belongs to {}?",
    "Tell me what {} owns.",
    "What is the thing of {}?",
    "Do you know what {} owns?",
)
FIND = (
    "Where is {} right now?",
    "Where is {} at this moment?",
    "Where can I find {}?",
    "Where can {} be found?",
    "Find {} for me.",
    "Please find {}.",
    "Tell me where to find {}.",
    "Tell me where {} is right now.",
    "Do you know where {} is right now?",
    "Who knows where {} is right now?",
)
"""What only the tool knows. A trip, of which the question tells, asks in other words: "Where is {} now?"."""

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Where a person is now",
        "parameters": {"type": "object", "properties": {"who": {"type": "string"}}, "required": ["who"]},
    },
}
"""The tool, in the form of OpenAI's API."""

MOST_TURNS = 4
STORIES = 0.1
"""Share of the training texts that are stories."""
WITH_TOOL = 0.06
"""Share of the training texts that have the tool."""
MOST_ASKED = 2
"""The most questions of a text that has the tool: a call makes two turns of one."""
CALLS = 0.6
"""Share of the questions there that need it."""
UNKNOWN = 0.03
"""Share of the questions of texts without the tool that need it."""

HELD_OUT_ONE_IN = 6
"""One combination in this many is held out for the exam."""
TRIES = 200
"""Draws without a new question after which a category counts as exhausted."""

END = "<|end|>"
"""The token that ends a text and a turn."""


@dataclass(frozen=True, slots=True)
class Document:
    """One training text, in turns of (prompt, reply). Replies, and the end token after each, count in the loss.

    A text that counts completely is one turn with an empty prompt.
    """

    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its only right answer and its combination."""

    category: str
    question: str
    answer: str
    combination: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The question in the chat template's format, up to the beginning of the reply."""
        return (_tool_list() if self.category == "tool" else "") + _asked(self.question)


def held_out(combination: tuple[str, ...]) -> bool:
    """Whether a combination belongs to the exam."""
    return zlib.crc32("|".join(combination).encode()) % HELD_OUT_ONE_IN == 0


Made = tuple[tuple[str, ...], str, str]
"""(combination, question, answer)"""


def _home(rng: random.Random) -> Made:
    who, words = rng.choice(PEOPLE), rng.choice(WHERE)
    return (who, words), words.format(who), f"{who} lives at the {HOME_OF[who]}."


def _owns(rng: random.Random) -> Made:
    who, words = rng.choice(PEOPLE), rng.choice(WHAT)
    thing = THING_OF[who]
    return (who, words), words.format(who), f"{who} owns the {COLOUR_OF[thing]} {thing}."


def _pair(rng: random.Random) -> Made:
    one, two = rng.sample(PEOPLE, 2)
    answer = f"{one} lives at the {HOME_OF[one]}, and {two} lives at the {HOME_OF[two]}."
    return (one, "and", two), f"Where do {one} and {two} live?", answer


def _trip(rng: random.Random) -> Made:
    who, place = rng.choice(PEOPLE), rng.choice(PLACES)
    return (who, "to", place), f"{who} went to the {place}. Where is {who} now?", f"{who} is at the {place}."


def _gift(rng: random.Random) -> Made:
    (giver, taker), thing = rng.sample(PEOPLE, 2), rng.choice(THINGS)
    told = f"{giver} gave the {thing} to {taker}."
    return (giver, thing, taker), f"{told} Who has the {thing} now?", f"{taker} has the {thing} now."


def _sum(rng: random.Random) -> Made:
    a, b = rng.randrange(10), rng.randrange(10)
    return (str(a), "+", str(b)), f"What is {a}+{b}?", f"{a}+{b}={a + b}"


def _list(rng: random.Random) -> Made:
    things = rng.sample(THINGS, 3)
    return ("list", *things), f"Write as JSON: {things[0]}, {things[1]} and {things[2]}.", json.dumps(things)


def _object(rng: random.Random) -> Made:
    who, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    return (who, "has", thing), f"Write as JSON: {who} has the {thing}.", json.dumps({who: thing})


def _tool(rng: random.Random) -> Made:
    who, words = rng.choice(PEOPLE), rng.choice(FIND)
    return (who, words), words.format(who), _call(who)


def _unknown(rng: random.Random) -> Made:
    combination, question, _ = _tool(rng)
    return combination, question, f"I do not know where {combination[0]} is."


MAKERS = dict(zip(CATEGORIES, (_home, _owns, _pair, _trip, _gift, _sum, _list, _object, _tool, _unknown)))


# What a server renders for a client that sends `TOOL`: the texts of the chat template itself.


@cache
def _template() -> ChatTemplate:
    return ChatTemplate(CHAT_TEMPLATE, {"eos_token": END})


def _asked(question: str) -> str:
    """A user's turn, up to the beginning of the reply."""
    return f"<|user|>{question}{END}<|assistant|>"


@cache
def _tool_list() -> str:
    """The system's turn that lists the tool."""
    asks = [{"role": "user", "content": ""}]
    return _template().render(asks, tools=[TOOL]).removesuffix(_template().render(asks))


@cache
def _call(who: str) -> str:
    """The reply that calls the tool."""
    function = {"name": TOOL["function"]["name"], "arguments": {"who": who}}
    calls = {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    return _template().render([calls], add_generation_prompt=False).removeprefix("<|assistant|>").removesuffix(END)


@cache
def _response(place: str) -> str:
    """The turn with the tool's answer, up to the beginning of the reply."""
    return _template().render([{"role": "tool", "content": f"at the {place}"}])


def _question(rng: random.Random, category: str, exam: bool) -> Question:
    """A random question, held out or not."""
    while True:
        combination, question, answer = MAKERS[category](rng)
        if held_out(combination) == exam:
            return Question(category, question, answer, combination)


def held_out_question(category: str, seed: int = 0) -> Question:
    """One that the exam may ask."""
    return _question(random.Random(f"tinyworld question {seed}"), category, exam=True)


def _story(rng: random.Random) -> str:
    """A story in which two people meet and may exchange a thing. It contains no held-out combination."""
    while True:
        who, other = rng.sample(PEOPLE, 2)
        thing, away = THING_OF[who], HOME_OF[other]
        if not held_out((who, "to", away)) and not held_out((who, thing, other)):
            break
    colour, home = COLOUR_OF[thing], HOME_OF[who]
    opening = rng.choice(
        (
            f"Once upon a time, {who} lived at the {home}.",
            f"Once upon a time, there was a child called {who}, who lived at the {home}.",
        )
    )
    wish = rng.choice(
        (
            f"{who} owned the {colour} {thing} and liked it very much.",
            f"One day {who} took the {colour} {thing} and went out.",
        )
    )
    talk = rng.choice(
        (
            f'"What a nice {thing}," said {other}. "It is {colour}!"',
            f'"May I have the {thing}?" said {other}.',
            f'"I like your {colour} {thing}," said {other}.',
        )
    )
    turn = rng.choice(
        (f"So {who} gave the {thing} to {other}.", f"{who} said yes, and they played with the {thing} all day.")
    )
    end = rng.choice((f"Then {who} went home to the {home} and was happy.", "They were good friends ever after."))
    return " ".join((opening, wish, f"{who} went to the {away} and met {other}.", talk, turn, end))


def _text_with_tool(rng: random.Random) -> Document:
    """Questions in a text that has the tool: some need it, some do not."""
    turns: list[tuple[str, str]] = []
    for _ in range(rng.randint(1, MOST_ASKED)):
        question = _question(rng, "tool" if rng.random() < CALLS else rng.choice(TOLD), exam=False)
        turns.append((_asked(question.question), question.answer))
        if question.category == "tool":
            who = question.combination[0]
            place = rng.choice([place for place in PLACES if not held_out((who, "to", place))])
            turns.append((_response(place), f"{who} is at the {place}."))
    return Document(((_tool_list() + turns[0][0], turns[0][1]), *turns[1:]))


def documents(seed: int) -> Iterator[Document]:
    """Endless training texts, without held-out combinations."""
    rng = random.Random(f"tinyworld {seed}")
    while True:
        if rng.random() < STORIES:
            yield Document((("", _story(rng)),))
            continue
        if rng.random() < WITH_TOOL:
            yield _text_with_tool(rng)
            continue
        kinds = ["unknown" if rng.random() < UNKNOWN else rng.choice(TOLD) for _ in range(rng.randint(1, MOST_TURNS))]
        questions = [_question(rng, kind, exam=False) for kind in kinds]
        yield Document(tuple((question.prompt, question.answer) for question in questions))


def build_tokenizer(vocab_size: int, seed: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, learnt from 4,000 training texts.

    Digits are single tokens; `<|end|>` ends a text and a turn. Equal arguments give equal tokenizers.
    """
    texts = islice(documents(seed), 4000)
    return learn_tokenizer(
        (part for text in texts for turn in text.turns for part in turn),
        vocab_size,
        END,
        "data.vocab_size",
        "tinyworld",
    )


def exam(seed: int, n: int) -> list[tuple[str, str, str]]:
    """Up to `n` different held-out questions: (category, prompt, right answer), categories in turn."""
    rng = random.Random(f"tinyworld exam {seed}")
    asked: dict[str, tuple[str, str, str]] = {}
    open_ones = list(CATEGORIES)
    while open_ones and len(asked) < n:
        category = open_ones.pop(0)
        for _ in range(TRIES):
            question = _question(rng, category, exam=True)
            if question.prompt not in asked:
                asked[question.prompt] = (category, question.prompt, question.answer)
                open_ones.append(category)
                break
    return list(asked.values())


def grade(expected: str, reply: str) -> bool:
    """Whether a reply equals the answer, apart from white space around it."""
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
    """`n` different raw prompts of mixed lengths: openings of stories, questions, whole stories and a question."""
    rng = random.Random(f"tinyworld prompts {seed}")
    texts: list[str] = []
    while len(texts) < n:
        words = _story(rng).split(" ")
        question = _question(rng, rng.choice(TOLD), exam=True).prompt
        text = (
            " ".join(words[: rng.randint(1, 12)]),
            question,
            " ".join(words[: rng.randint(9, len(words))]),
            "".join(_story(rng) + "<|end|>" for _ in range(rng.randint(1, 3))) + question,
        )[len(texts) % 4]
        if text not in texts:
            texts.append(text)
    return texts
