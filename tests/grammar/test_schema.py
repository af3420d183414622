"""Schemas as they are handed to llguidance: what is kept, what is refused and how."""

import json

import pytest

from grammar.grammar_kit import accepts, accepts_json, compiled_schema
from headrace.errors import RequestError
from headrace.grammar.schema import checked_schema

DRAFT_4, DRAFT_7 = (f"http://json-schema.org/draft-0{n}/schema#" for n in (4, 7))


def checked(schema, strict=False):
    return checked_schema(json.dumps(schema), strict)


def refusal(schema, strict=False) -> str:
    with pytest.raises(RequestError) as caught:
        compiled_schema(schema, strict=strict)
    assert caught.value.param == "constraint"
    return str(caught.value)


def judged(schema, texts) -> dict[str, bool]:
    """Each text, and whether the schema's grammar accepts it."""
    matcher = compiled_schema(schema)
    return {text: accepts(matcher, text) for text in texts}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"uniqueItems": True}, "#/uniqueItems"),
        ({"properties": {"a/b": {"items": {"contains": {"type": "null"}}}}}, "#/properties/a~1b/items/contains"),
        ({"not": {"pattern": "a"}}, "#/not"),
        ({"if": {"pattern": "a"}, "then": {"minLength": 2}}, "#/if"),
        (
            {"oneOf": [{"type": "string", "pattern": "a"}, {"type": "string"}]},
            "#/oneOf cannot be honoured: a value could fit 0 and 1",
        ),
        ({"propertyNames": {"format": "ipv4", "minLength": 3}}, "#/propertyNames"),
        ({"allOf": [True], "unevaluatedProperties": False}, "#/unevaluatedProperties"),
        ({"$ref": "#/$defs/a", "unevaluatedItems": False, "$defs": {"a": {}}}, "#/unevaluatedItems"),
        ({"not": {"maxProperties": 3}}, "#/not"),
        ({"$dynamicRef": "#a"}, "#/$dynamicRef"),
        ({"$recursiveRef": "#"}, "#/$recursiveRef"),
        ({"$ref": "https://example.com/other"}, "#/$ref leads to no schema of this document"),
        ({"$ref": "#/$defs/none"}, "#/$ref leads to no schema"),
        ({"$ref": DRAFT_7}, "#/$ref leads to no schema"),
        ({"$ref": "#"}, "leads back to itself"),
        ({"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"anyOf": [{"$ref": "#"}, {}]}}}, "leads back to itself"),
        ({"minProperties": 2}, "#/minProperties"),
        ({"minItems": 10_000_000}, "#/minItems"),
        ({"x-guidance": {}}, "#/x-guidance cannot be honoured: these options are set by the server"),
        ({"multipleOf": 0.123456789}, "#/multipleOf"),
        ({"allOf": [{"multipleOf": 65537}, {"multipleOf": 65539}]}, "multipleOf of 65537, 65539"),
        ({"const": 2**53 + 1}, "#/const"),
        ({"enum": ["a", "\0"]}, "#/enum/1"),
        ({"minimum": 10**30}, "bound"),
    ],
)
def test_what_cannot_be_honoured_is_named_with_its_place(schema, words):
    assert words in refusal(schema)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "text"}, "#/type must be one of null, boolean"),
        ({"type": []}, "#/type must be"),
        ({"properties": []}, "#/properties must be an object of schemas by name"),
        ({"properties": {"a": 1}}, "#/properties/a must be a schema"),
        ({"required": True}, "#/required must be a list of names"),
        ({"minLength": -1}, "#/minLength must be a whole number"),
        ({"minLength": 1.5}, "#/minLength must be a whole number"),
        ({"anyOf": []}, "#/anyOf must be a list of one or more schemas"),
        ({"items": 3}, "#/items must be a schema"),
        ({"multipleOf": 0}, "#/multipleOf must be a number greater than 0"),
        ({"minimum": "1"}, "#/minimum must be a number"),
        ({"$ref": 1}, "#/$ref must be a text"),
        ({"prefixItems": [True], "items": [True]}, "#/items must be a schema, as prefixItems is the list"),
        ({"dependencies": {"a": 1}}, "#/dependencies/a must be a schema"),
    ],
)
def test_a_value_that_a_keyword_cannot_have_is_named(schema, words):
    assert words in refusal(schema)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '"a"', '{"minimum": NaN}', '{"maximum": 1e999}', '{"const": "\\ud800"}']
)
def test_text_that_is_no_schema(text):
    with pytest.raises(RequestError, match="the schema"):
        checked_schema(text)


@pytest.mark.parametrize("key", ["items", "not", "additionalProperties"])
def test_a_schema_nested_without_end_is_refused_plainly(key):
    with pytest.raises(RequestError, match="nested more than 100 deep"):
        checked_schema(f'{{"{key}": ' * 10_000 + "{}" + "}" * 10_000)
    assert checked_schema(f'{{"{key}": ' * 90 + "{}" + "}" * 90) is not None


def test_long_chains_of_references_are_followed():
    chain = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(2_000)} | {"a2000": {"type": "null"}}
    for definitions in (chain, dict(reversed(list(chain.items())))):
        assert checked({"$ref": "#/$defs/a0", "$defs": definitions})
    chain["a2000"] = {"$ref": "#/$defs/a0"}
    assert "leads back to itself" in refusal({"$ref": "#/$defs/a0", "$defs": chain})


def test_annotations_and_unknown_words_say_nothing():
    words = {
        "title": "T",
        "description": "d",
        "default": {"not": 1},
        "examples": [{"uniqueItems": True}],
        "readOnly": True,
    }
    words |= {
        "$comment": "c",
        "deprecated": True,
        "contentEncoding": "base64",
        "$schema": DRAFT_7,
        "$id": "https://a.b/c",
    }
    assert checked(words, strict=True) is True
    for unknown in ({"nullable": True}, {"format": "colour"}, {"format": "unknown"}, {"divisibleBy": 2}):
        assert checked({**words, **unknown}) is True
        assert "strict" in refusal(unknown, strict=True)


def test_names_and_values_are_no_keywords():
    names = ("uniqueItems", "not", "$ref", "x-guidance", "$id", "type")
    schema = {
        "type": "object",
        "properties": {name: {"type": "integer"} for name in names},
        "required": list(names),
        "additionalProperties": False,
        "dependentRequired": {"not": ["type"]},
        "$defs": {"uniqueItems": {"uniqueItems": True}},
    }
    assert accepts_json(compiled_schema(schema, strict=True), dict.fromkeys(names, 1))
    value = {"not": 1, "$ref": "https://example.com", "x-guidance": {"lenient": True}}
    for same in ({"const": value}, {"enum": [value]}):
        assert accepts_json(compiled_schema(same), value)


def test_what_has_no_effect_is_dropped():
    for schema in (
        {"uniqueItems": False},
        {"contains": {}, "minContains": 0},
        {"then": False},
        {"if": {"pattern": "a"}},
    ):
        assert accepts_json(compiled_schema(schema), [])
    few = {"uniqueItems": True, "maxItems": 1, "type": "array"}
    assert judged(few, ["[1]", "[1, 1]"]) == {"[1]": True, "[1, 1]": False}
    nulls = {"additionalItems": False, "items": {"type": "null"}, "type": "array"}
    assert judged(nulls, ["[null, null]", "[1]"]) == {"[null, null]": True, "[1]": False}


@pytest.mark.parametrize(
    ("schema", "texts"),
    [
        # A name written with escapes would be another property for llguidance and the same one for a reader.
        (
            {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {'{"a": 1, "\\u0061": "x"}': False, '{"a": 1, "b": "x"}': True},
        ),
        (
            {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5},
            {"0": False, "0.0": False, "0.1": True, "0.5": True},
        ),
        ({"type": "number", "exclusiveMaximum": 0, "minimum": -0.5}, {"-0": False, "0": False, "-0.25": True}),
        ({"type": "integer", "exclusiveMinimum": 2**53}, {str(2**53): False, str(2**53 + 2): True}),
        ({"type": "integer", "maximum": 2**63 - 1}, {"5": True, str(2**63): False}),
        ({"type": "string", "pattern": "^[a[b]c]$"}, {'"a"': False, '"[c]"': True, '"bc]"': True}),
        ({"type": "string", "pattern": "^(?<stop>a)b$"}, {'"ab"': True, '"a"': False}),
        ({"type": "string", "pattern": "^.$"}, {'"\\r"': False, '"a"': True}),
        ({"type": "string", "format": "date"}, {'"2023-02-29"': False, '"2024-02-29"': True, '"0000-01-01"': False}),
        (
            {"prefixItems": [{"type": "null"}], "items": True, "additionalItems": False, "type": "array"},
            {"[1]": False, "[null, 1]": True},
        ),
        (
            {"dependencies": {"a": ["b"]}, "type": "object"},
            {'{"a": 1}': False, '{"a": 1, "b": 1}': True, '{"b": 1}': True},
        ),
    ],
)
def test_what_llguidance_alone_would_accept_wrongly(schema, texts):
    assert judged(schema, texts) == texts


@pytest.mark.parametrize(
    ("schema", "texts"),
    [
        ({"not": {"type": "string"}}, {'"a"': False, "1": True, "[]": True}),
        ({"not": {"required": ["a"]}}, {'{"a": 1}': False, '{"b": 1}': True, "1": False}),
        ({"not": {"not": {"pattern": "^a"}}}, {'"ab"': True, '"b"': False}),
        (
            {"type": "string", "not": {"enum": ["ab", "ac", "é"]}},
            {'"ab"': False, '"é"': False, '"a"': True, '"abc"': True},
        ),
        ({"type": "integer", "not": {"const": 5}}, {"5": False, "4": True, "55": True}),
        (
            {
                "if": {"properties": {"k": {"const": "x"}}, "required": ["k"]},
                "then": {"required": ["y"]},
                "else": {"required": ["z"]},
                "type": "object",
            },
            {
                '{"k": "x", "y": 1}': True,
                '{"k": "x", "z": 1}': False,
                '{"z": 1}': True,
                '{"k": "w", "z": 1}': True,
                "{}": False,
            },
        ),
        ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, {'"a"': True, "1": True, "null": False}),
        ({"oneOf": [{"const": "a"}, {"const": "b"}]}, {'"a"': True, '"c"': False}),
        (
            {"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object"},
            {'{"a": 1}': True, '{"a": 1, "b": 1}': False, "{}": False},
        ),
        ({"oneOf": [{"maximum": 5}, {"minimum": 3}], "type": "integer"}, {"2": True, "4": False, "6": True}),
        (
            {
                "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
                "$defs": {
                    n: {"type": "object", "properties": {"kind": {"const": n}}, "required": ["kind"]} for n in "ab"
                },
            },
            {'{"kind": "a"}': True, '{"kind": "c"}': False},
        ),
        ({"dependentSchemas": {"a": {"required": ["b"]}}, "type": "object"}, {'{"a": 1}': False, '{"c": 1}': True}),
        ({"propertyNames": {"pattern": "^a"}, "type": "object"}, {'{"ab": 1}': True, '{"b": 1}': False}),
        ({"propertyNames": {"maxLength": 2}, "type": "object"}, {'{"ab": 1}': True, '{"abc": 1}': False}),
        ({"propertyNames": {"enum": ["a", "b"]}, "type": "object"}, {'{"a": 1}': True, '{"c": 1}': False}),
        (
            {"properties": {"a": True}, "unevaluatedProperties": False, "type": "object"},
            {'{"a": 1}': True, '{"b": 1}': False},
        ),
        ({"prefixItems": [True], "unevaluatedItems": False, "type": "array"}, {"[1]": True, "[1, 2]": False}),
        (
            {"properties": {"a": True, "b": True}, "minProperties": 1, "type": "object"},
            {"{}": False, '{"b": 1}': True, '{"c": 1}': True},
        ),
        (
            {
                "properties": dict.fromkeys("abc", True),
                "additionalProperties": False,
                "minProperties": 2,
                "maxProperties": 2,
                "type": "object",
            },
            {'{"a": 1}': False, '{"a": 1, "c": 1}': True, '{"a": 1, "b": 1, "c": 1}': False},
        ),
        ({"contains": {}, "minContains": 2, "type": "array"}, {"[1]": False, "[1, 2]": True}),
        ({"minimum": 3, "exclusiveMinimum": True, "type": "integer", "$schema": DRAFT_4}, {"3": False, "4": True}),
        (
            {"items": [{"type": "null"}], "additionalItems": {"type": "string"}, "type": "array"},
            {'[null, "a"]': True, '["a"]': False, "[null, 1]": False},
        ),
        ({"type": "string", "pattern": r"^[\w-.]+$"}, {'"a-."': True, '"a b"': False}),
        ({"type": "string", "pattern": r"^[\b]$"}, {'"\\b"': True, '"b"': False}),
        ({"type": "string", "not": {"maxLength": 2}}, {'"ab"': False, '"abc"': True}),
        ({"type": "string", "minLength": 2.0, "maxLength": 3}, {'"a"': False, '"éé"': True, '"abcd"': False}),
    ],
)
def test_rules_that_are_written_in_other_keywords(schema, texts):
    assert judged(schema, texts) == texts


@pytest.mark.parametrize(
    "reference",
    [
        "#/$defs/a~1b%25",
        "#anchor",
        "https://example.com/root.json#/$defs/a~1b%25",
        "root.json#anchor",
        "inner",
        "inner#/properties/x",
        "urn:x:y#/not",
    ],
)
def test_references_within_the_document(reference):
    definitions = {
        "a/b%": {"type": "null"},
        "named": {"$anchor": "anchor", "type": "null"},
        "moved": {"$id": "inner", "type": "null", "properties": {"x": {"type": "null"}}},
        "urn": {"$id": "urn:x:y", "not": {"type": "null"}},
    }
    schema = {"$id": "https://example.com/root.json", "$ref": reference, "$defs": definitions}
    assert judged(schema, ["null", "1"]) == {"null": True, "1": False}


def test_siblings_of_a_reference_count_since_2019():
    schema = {"$ref": "#/definitions/a", "maxLength": 1, "definitions": {"a": {"type": "string"}}}
    assert judged(schema, ['"a"', '"ab"']) == {'"a"': True, '"ab"': False}
    assert judged({**schema, "$schema": DRAFT_7}, ['"ab"', "1"]) == {'"ab"': True, "1": False}


def test_a_schema_may_refer_to_itself_within_a_value():
    schema = {
        "type": "object",
        "properties": {"next": {"$ref": "#"}, "n": {"type": "integer"}},
        "additionalProperties": False,
    }
    texts = {'{"next": {"next": {}, "n": 1}}': True, '{"next": 1}': False}
    assert judged(schema, texts) == texts


def test_a_property_that_would_never_end_cannot_begin():
    endless = {"type": "object", "properties": {"b": {"$ref": "#/$defs/endless"}}, "required": ["b"]}
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/endless"}}, "$defs": {"endless": endless}}
    matcher = compiled_schema(schema)
    assert accepts(matcher, '{"c": 1}')
    assert matcher.try_consume_tokens(list(b'{"a"')) == 3


@pytest.mark.parametrize(
    "schema",
    [
        False,
        {"enum": []},
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1}}},
        {"type": "string", "const": 1},
        {"type": "integer", "minimum": 3, "maximum": 2},
    ],
)
def test_a_schema_that_nothing_fits_is_refused(schema):
    message = refusal(schema)
    assert "no value" in message or "no JSON" in message or "no text" in message


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (r"^(?=a)b", "a lookahead, (?=…)"),
        (r"(?!a)b", "a negative lookahead"),
        (r"(?<=a)b", "a lookbehind"),
        (r"(?<!a)b", "a negative lookbehind"),
        (r"(a)\1", r"a backreference, \1"),
        (r"(?<n>a)\k<n>", r"a backreference, \k"),
        (r"\bword", r"a word boundary, \b"),
        (r"a++", "possessive quantifier"),
        (r"(?>a)", "an atomic group"),
        (r"(?i)a", "no group that begins with (?i)"),
        (r"a{,3}", "write {0,n}"),
        (r"\Aa", r"no escape \A"),
        (r"*a", "nothing stands before the *"),
        (r"(a", "not closed"),
        (r"a)", "closes nothing"),
        (r"[a", "not closed"),
        (r"[b-a]", "counts down"),
        ("a\\", "backslash stands at its end"),
    ],
)
def test_patterns_that_no_automaton_has_are_named(pattern, words):
    for schema in ({"pattern": pattern}, {"patternProperties": {pattern: True}}):
        message = refusal(schema)
        assert words in message
        assert "#/pattern" in message
