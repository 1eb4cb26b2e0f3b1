from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.yaml_text import parse, write_text, write_value

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.sampled_from(["on", "1e3", "~"])
)
KEYS = st.text(min_size=1, max_size=20).filter(lambda key: "." not in key)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(VALUES)
def test_written_values_read_back_as_the_same(value: object) -> None:
    text = write_value(value)
    parsed = parse(f"key: {text}  # a comment")
    assert not parsed.problems
    assert parsed.values == {"key": value}
    # 1 == 1.0 == True in Python, so types are compared too.
    assert repr(parsed.values["key"]) == repr(value)
    assert "\n" not in text
    line, column = parsed.ends[("key",)]
    assert (line, column) == (0, len(f"key: {text}"))


@settings(max_examples=200, deadline=None)
@given(KEYS)
def test_written_keys_read_back_as_the_same(key: str) -> None:
    assert parse(f"{write_text(key)}: 1").values == {key: 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.inf", float("-inf")),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("+3", 3),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("=", "="),
        ("1e", "1e"),
        ("e3", "e3"),
        (".", "."),
        ("True", True),
        ("tRUE", "tRUE"),
        ("~", None),
        ("", None),
        ("nUll", "nUll"),
        ("!!str 1", "1"),
        ("'1'", "1"),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text: str, value: object) -> None:
    parsed = parse(f"key: {text}")
    assert not parsed.problems
    assert parsed.values["key"] == value
    assert type(parsed.values["key"]) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb:\n\tc: 1", 3, "tabs"),
        ("a: 1\nb: c: d", 2, "indentation"),
        ("a:\n  b: 1\n c: 2", 3, "indentation"),
        ("a: [1, 2", 1, "'[' is not closed"),
        ("a: {b: 1", 1, "'{' is not closed"),
        ("a: 'b", 1, "quote is not closed"),
        ("a: 1\n---\nb: 2", 2, "one document"),
        ("a: *.jsonl", 1, "needs quotes"),
        ("a: &x 1\nb: *x", 2, "needs quotes"),
        ("a: @b", 1, "needs quotes"),
        ("a: 1\nb", 2, "key: value"),
        ("a: 1\nb: \x00", 2, "U+0000"),
        ("a: !!python/object/apply:os.system ['true']", 1, "tag"),
        ("a: !!int x", 1, "cannot be read as int"),
        ("a: 1\na: 2", 2, "given twice, also on line 1"),
        ("1: a", 1, "quotes round it"),
        ("a.b: 1", 1, "a: {b: ...}"),
        ("'': 1", 1, "empty key"),
        ("? [a]\n: 1", 1, "a key is one word"),
        ("a: " + "[" * 1000, 1, "nested too deeply"),
        ("a: " + "9" * 5000, 1, "cannot be read as int"),
    ],
)
def test_faults_name_their_line_and_a_remedy(text: str, line: int, words: str) -> None:
    problems = parse(text).problems
    assert [at for at, _, _ in problems] == [line]
    assert words in problems[0][2]


def test_lines_of_keys_are_kept_in_every_style() -> None:
    parsed = parse("a: {b: 1,\n  c: 2}\n\nd:\n  e:\n    - 1\n")
    assert {key: parsed.lines[key] for key in [("a", "b"), ("a", "c"), ("d",), ("d", "e")]} == {
        ("a", "b"): 1,
        ("a", "c"): 2,
        ("d",): 4,
        ("d", "e"): 5,
    }


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab:-[]{}'\"#&*!|>%@,?\n\t 1.~"), max_size=40))
def test_any_text_is_read_or_refused_without_raising(text: str) -> None:
    parse(text)
