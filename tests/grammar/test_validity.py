"""What fits a grammar is valid: on drawn schemas, for another validator, and on the suites of real schemas."""

import json

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grammar.grammar_kit import accepts_json, compiled_schema, made, schema_groups
from headrace.errors import RequestError
from headrace.grammar.schema import checked_schema

DRAFT_7 = "http://json-schema.org/draft-07/schema#"
PATTERNS = [
    r"^a",
    r"b$",
    r"^[a-c]+$",
    r"^.$",
    r"\d",
    r"^\w+$",
    r"\S",
    r"[^a]",
    r"^(a|b)*$",
    r"^[\d-]+$",
    r"^\W$",
    r"a{2}",
    r"^$",
    r"^[^\s]+$",
    r"a|^b",
    r"^(?:a|bc)?$",
    r"\.",
    r"[a[b]",
    r"a&&b",
    r"^[a-z&&b]+$",
    r"^a*?$",
    r"[]a]|b",
    r"^\x41\u0042\cA?$",
    r"^[^\D]$",
    r"\/",
    r"^[a\-z]$",
    r"^{a}$",
    r"\u{e9}",
    r"^(?<n>a)$",
    r"^\D\S$",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=30)
@given(st.text(alphabet="ab1-.&[]{}/A é\n\t٣_", max_size=4))
def test_a_text_that_fits_a_pattern_matches_it_elsewhere_too(pattern, text):
    matcher = compiled_schema({"type": "string", "pattern": pattern})
    if accepts_json(matcher, text):
        assert jsonschema_rs.is_valid({"pattern": pattern}, text)


NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 5, 10, 0.5, -0.5, 1.5, -2, 100, 0.1, 7, -7.25, 0.25])
NAMES = st.sampled_from(["a", "b", "c", "é"])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.sampled_from(["", "a", "ab", "é", "a\nb"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=3,
)
TYPES = st.sampled_from(
    ["object", "array", "string", "number", "integer", "boolean", "null", ["string", "null"], ["object", "array"]]
)
SIMPLE = {
    "type": TYPES,
    "const": VALUES,
    "enum": st.lists(VALUES, min_size=1, max_size=3),
    "required": st.lists(NAMES, max_size=2, unique=True),
    "dependentRequired": st.dictionaries(NAMES, st.lists(NAMES, max_size=2, unique=True), max_size=1),
    "format": st.sampled_from(["date", "time", "ipv4", "uuid", "hostname"]),
    "pattern": st.sampled_from(PATTERNS[:13]),
    "multipleOf": st.sampled_from([1, 2, 3, 0.5, 0.25, 10]),
    "$ref": st.sampled_from(["#", "#/$defs/d"]),
    **dict.fromkeys(
        ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"), st.integers(0, 3)
    ),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), NUMBERS),
}
ONE = (
    "items",
    "additionalProperties",
    "propertyNames",
    "not",
    "if",
    "then",
    "else",
    "unevaluatedProperties",
    "unevaluatedItems",
)


def with_schemas(inner):
    applied = {
        **dict.fromkeys(ONE, inner),
        **dict.fromkeys(("anyOf", "oneOf", "allOf", "prefixItems"), st.lists(inner, min_size=1, max_size=3)),
        "properties": st.dictionaries(NAMES, inner, min_size=1, max_size=3),
        "patternProperties": st.dictionaries(st.sampled_from(PATTERNS[:3]), inner, min_size=1, max_size=1),
        "dependentSchemas": st.dictionaries(NAMES, inner, min_size=1, max_size=1),
    }
    rules = {**SIMPLE, **applied}
    keys = st.lists(st.sampled_from(sorted(rules)), min_size=1, max_size=4, unique=True)
    return keys.flatmap(lambda chosen: st.fixed_dictionaries({key: rules[key] for key in chosen}))


SCHEMAS = st.recursive(
    st.booleans() | st.sampled_from(sorted(SIMPLE)).flatmap(lambda key: st.fixed_dictionaries({key: SIMPLE[key]})),
    with_schemas,
    max_leaves=6,
)


@settings(max_examples=150)
@given(with_schemas(SCHEMAS), SCHEMAS, st.randoms(use_true_random=False))
def test_what_a_grammar_makes_is_valid(schema, definition, draw):
    schema = {**schema, "$defs": {"d": definition}}
    try:
        matcher = compiled_schema(schema)
    except RequestError:
        return
    valid = jsonschema_rs.Draft202012Validator(schema, validate_formats=True)
    for _ in range(3):
        text = made(matcher, draw)
        if text is not None and b"e" not in text.lower():  # an exponent can exceed what a double holds
            assert valid.is_valid(json.loads(text)), text


@settings(max_examples=100)
@given(with_schemas(SCHEMAS), st.booleans())
def test_no_schema_ends_in_another_error(schema, strict):
    try:
        checked_schema(json.dumps(schema), strict)
    except RequestError as error:
        assert error.param == "constraint"


@pytest.mark.parametrize("folder", ["tests/draft7/", "tests/draft2020-12/", "maskbench/"])
def test_no_invalid_instance_of_the_suites_is_accepted(data_dir, folder):
    served = valid = accepted = schemas = 0
    wrong = []
    for name, schema, tests in schema_groups(data_dir, folder):
        if "draft7" in folder and isinstance(schema, dict):
            schema = {"$schema": DRAFT_7, **schema}
        schemas += 1
        try:
            matcher = compiled_schema(schema)
        except RequestError:
            continue
        served += 1
        for value, is_valid, shows in tests:
            if any("\ud800" <= character <= "\udfff" for character in json.dumps(value, ensure_ascii=False)):
                continue
            fits = accepts_json(matcher, value)
            valid, accepted = valid + is_valid, accepted + (is_valid and fits)
            if fits and not is_valid:
                wrong.append(f"{name}: {shows}")
    assert wrong == []
    assert served >= 0.65 * schemas
    assert accepted >= 0.94 * valid
