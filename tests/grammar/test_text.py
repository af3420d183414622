"""The text of each kind of constraint, what it accepts, and what it says where it cannot be honoured."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher

from grammar.grammar_kit import BYTES, accepts, compiled, matcher_of
from headrace.engine.schedule.constraint import Constraint
from headrace.errors import RequestError
from headrace.grammar.text import bad_words_text, compile_error, embedded_schema, refuse_empty

NESTED = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}, "b": {"type": "null"}}}


def refusal(constraint) -> str:
    with pytest.raises(RequestError) as caught:
        compiled(constraint)
    assert caught.value.param == "constraint"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_json_has_one_space_after_its_separators():
    for constraint in (Constraint.json_schema(NESTED), Constraint.json()):
        matcher = compiled(constraint)
        assert accepts(matcher, json.dumps({"a": [1, 2], "b": None}))
        for other in ('{"a":[1, 2]}', '{"a": [1,2]}', '{ "a": [1, 2]}', '{"a": [1, 2]} ', '{"a": [1,  2]}', "\n{}"):
            assert not accepts(matcher, other)
    assert not accepts(compiled(Constraint.json()), "[]")


def test_without_space():
    matcher = compiled(Constraint.json_schema(NESTED, whitespace=""))
    assert accepts(matcher, '{"a":[1,2],"b":null}')
    assert not accepts(matcher, '{"a": [1,2],"b":null}')


def test_with_space_of_the_user_s():
    matcher = compiled(Constraint.json_schema(NESTED, whitespace=r"(?:\n| {1,2})"))
    for text in ('{"a":[1,2]}', '{ "a" :\n[1,  2 ]\n}'):
        assert accepts(matcher, text)
    for text in ('{"a":[1,   2]}', '{\t"a":[]}'):
        assert not accepts(matcher, text)


@pytest.mark.parametrize("whitespace", [r"[ \n\t\r]*", r"\x20?", r"\x0A{0,3}", " |\n", r"(\t|\r)+"])
def test_any_regular_expression_of_space_is_allowed(whitespace):
    assert accepts(compiled(Constraint.json(whitespace)), '{"a":1}')


@pytest.mark.parametrize(
    "whitespace", ["x", r"\s*", r"[ -~]", "[^a]", ".", r"\x41", "(", "*", " {", "[", "(?i) ", r"\v"]
)
def test_space_that_json_does_not_have_is_refused(whitespace):
    assert "whitespace" in refusal(Constraint.json(whitespace))


@pytest.mark.parametrize("schema", [True, {}])
def test_a_schema_of_anything(schema):
    matcher = compiled(Constraint.json_schema(schema))
    for text in ("1", '"é"', "[[], {}]", '{"a": {"b": [null, true, -1.5e3]}}'):
        assert accepts(matcher, text)
    assert not accepts(matcher, "[1,]")


def test_a_false_schema_is_refused():
    assert "no value" in refusal(Constraint.json_schema(False))


@pytest.mark.parametrize(
    ("pattern", "fitting", "others"),
    [
        ("ab|cd", ["ab", "cd"], ["abcd", "b", ""]),
        ("^ab$|^c$", ["ab", "c"], ["abc", "^ab$"]),
        (r"\d{3}-[^x]", ["123-y", "123-é"], ["12-y", "123-x", "123-yz"]),
        ("a*", ["", "aaa"], ["b"]),
        ("", [""], ["a"]),
        ("[[:alpha:]]+/", ["ab/"], ["/", "1/"]),
        ("(?s:.)+", ["a\nb"], [""]),
        (r"\p{Greek}\u{e9}\n", ["λé\n"], ["aé\n"]),
        (r"[\]\[(?=]+", ["](=?"], ["a"]),
    ],
)
def test_a_regular_expression_matches_all_of_the_text(pattern, fitting, others):
    matcher = compiled(Constraint.regex(pattern))
    assert all(accepts(matcher, text) for text in fitting)
    assert not any(accepts(matcher, text) for text in others)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("a(?=b)", "a lookahead, (?=…)"),
        ("(?!a)b", "a negative lookahead, (?!…)"),
        ("(?<=a)b", "a lookbehind, (?<=…)"),
        ("(?<!a)b", "a negative lookbehind, (?<!…)"),
        (r"(a)\1", r"a backreference, \1"),
        (r"(?P<x>a)(?P=x)", "a backreference, (?P=…)"),
        (r"a\b", r"a word boundary, \b"),
        ("(?>a)b", "an atomic group, (?>…)"),
        ("(?P<stop>a)b", 'a group named "stop"'),
        ("(a", "unclosed group"),
        ("a{2,1}", "repetition"),
        ("b^a", "^ and $"),
        ("[a&&b]", "no text fits it"),
        ("\ud800", "surrogate"),
    ],
)
def test_a_regular_expression_that_cannot_be_honoured(pattern, words):
    assert words in refusal(Constraint.regex(pattern))


CHOICES = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), min_size=1, max_size=6, unique=True
)


@given(CHOICES, st.text(st.characters(exclude_categories=["Cs"]), max_size=6))
def test_choices_are_accepted_and_nothing_else(choices, other):
    matcher = compiled(Constraint.choice(choices))
    assert all(accepts(matcher, choice) for choice in choices)
    assert accepts(matcher, other) == (other in choices)
    assert all(accepts(matcher, choice[:-1]) == (choice[:-1] in choices) for choice in choices)


@pytest.mark.parametrize(
    "text", ["[]", '["a", ""]', '["a", "a"]', '["a", 1]', '"a"', "{}", "[", '["\\ud800"]', "[" * 10_000]
)
def test_choices_that_are_none(text):
    with pytest.raises(RequestError, match="choice"):
        Constraint("choice", text)


def test_a_grammar():
    matcher = compiled(
        Constraint.lark('start: "sum " sum // a comment\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]+/ # another')
    )
    assert accepts(matcher, "sum 1+23+4")
    assert not accepts(matcher, "sum 1+")


def test_a_schema_in_a_grammar_has_the_rules_of_a_schema():
    grammar = (
        'start: "%json {" %json {"type": "object", "properties": {"a/b": {"format": "date"}}, "required": ["a/b"]} "}" '
    )
    matcher = compiled(Constraint.lark(grammar))
    assert accepts(matcher, '%json {{"a/b": "2024-02-29"}}')
    assert not accepts(matcher, '%json {{"a/b": "2023-02-29"}}')
    assert not accepts(matcher, '%json {{"a/b":"2024-02-29"}}')
    assert "#/uniqueItems" in refusal(Constraint.lark('start: %json {"uniqueItems": true}'))
    assert "#/x-guidance" in refusal(Constraint.lark('start: %json {"x-guidance": {"lenient": true}}'))


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ("", "needs a rule named start"),
        ('first: "a"', "start"),
        ('start: "a', "line 1"),
        ('start: "a"\nb[stop="x"]: /.*/', "line 2: the option stop"),
        ("start[max_tokens=3]: /.*/", "line 1: the option max_tokens"),
        ("start[temperature = 0.5]: /.*/", "line 1: the option temperature"),
        ("start: /a(?=b)/", "lookahead"),
        ("start: \n%json [1]", "must be an object"),
        ("start: %json {", "line 1: %json needs a schema"),
        ("start: unknown", "unknown"),
        ('start: X\nX: "a" & "b"', "no text fits it"),
        ("start: @other", "other"),
    ],
)
def test_a_grammar_that_cannot_be_honoured(grammar, words):
    assert words in refusal(Constraint.lark(grammar))


def test_words_in_a_grammar_s_texts_are_no_options():
    grammar = 'start: "stop=" stop /max_tokens=[0-9]/ // temperature=1\nstop: "x"'
    assert accepts(compiled(Constraint.lark(grammar)), "stop=xmax_tokens=1")


def test_an_embedded_schema_allows_the_same_space():
    text = embedded_schema(
        json.dumps({"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"const": [1, 2]}}})
    )
    matcher = matcher_of(f'start: "<" %json {text} ">"')
    assert accepts(matcher, '<{"a": [1, 2]}>')
    assert not accepts(matcher, '<{"a":[1,2]}>')
    compact = matcher_of(f'start: "<" %json {embedded_schema("true", "")} ">"')
    assert accepts(compact, '<{"a":[1,2]}>')
    with pytest.raises(RequestError, match="strict"):
        embedded_schema('{"colour": 1}', None, True)


WORDS = st.lists(st.text("abé\n", min_size=1, max_size=3), min_size=1, max_size=3)


@given(WORDS, st.text("abcé\n", max_size=8))
def test_bad_words_are_in_no_text(words, text):
    assert accepts(matcher_of(bad_words_text(words)), text) == (not any(word in text for word in words))


def test_without_bad_words_any_text_fits_but_no_broken_utf_8():
    for words in ([], ["bad"], ["b", "b"], ['"\\', "/", "\x7f"]):
        matcher = matcher_of(bad_words_text(words))
        for text in ("", "é\n\0", "🙂", "Bad a d"):
            assert accepts(matcher, text)
        assert not accepts(matcher, b"\xff")
        assert not accepts(matcher, b"\xc3")


@pytest.mark.parametrize("word", ["", "\ud800"])
def test_bad_words_that_are_no_text(word):
    with pytest.raises(RequestError) as caught:
        bad_words_text(["a", word])
    assert caught.value.param == "bad_words"


def test_an_empty_language_is_found_and_the_matcher_stays_as_it_is():
    empty = LLMatcher(BYTES, 'start: X\nX: "a" & "b"', log_level=0)
    assert not empty.is_error()
    with pytest.raises(RequestError, match="no text fits it"):
        refuse_empty(empty)
    for text in ('start: ""', 'start: "a"'):
        matcher = LLMatcher(BYTES, text, log_level=0)
        refuse_empty(matcher)
        assert accepts(matcher, "a" if "a" in text.removeprefix("start") else "")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ('Unimplemented keys: ["x"]', "Unimplemented keys"),
        ("at 3(7): unknown name\n   3 | start: x\n", "line 3, column 7: unknown name"),
        ("Parser too complex", "Parser too complex"),
        ("initial lexer configuration (grammar) too big (limit for this grammar: 1000000)", "too big"),
        ("", "no reason given"),
    ],
)
def test_messages_of_the_library_become_one_line(message, words):
    error = compile_error(message)
    assert error.param == "constraint"
    assert words in str(error)
    assert re.fullmatch(r"constraint .*", str(error))
    assert str(error.renamed({"constraint": "response_format"})).startswith("response_format")


def test_a_grammar_in_gbnf_is_one_too():
    """The form of EBNF that llama.cpp and vLLM read."""
    matcher = compiled(Constraint.lark('root ::= "SELECT " column\ncolumn ::= "a" | "b" column\n'))
    assert accepts(matcher, "SELECT bba") and not accepts(matcher, "SELECT b")
    with pytest.raises(RequestError, match=r"no GBNF: .*foo"):
        compiled(Constraint.lark("root ::= foo"))
