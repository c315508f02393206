"""YAML 1.2 scalars, errors with file and line, and text that survives being written and read."""

from __future__ import annotations

import math
import random

import pytest
import yaml

from sft_dist.config.yaml12 import dump_yaml, parse_yaml
from sft_dist.errors import ConfigError

SCALARS = [
    ("1e-5", 1e-5),
    ("1E5", 1e5),
    ("-.5", -0.5),
    ("1.", 1.0),
    (".inf", math.inf),
    ("-.Inf", -math.inf),
    ("12", 12),
    ("-12", -12),
    ("010", 10),
    ("0o14", 12),
    ("0x1F", 31),
    ("1_000", "1_000"),
    ("0b11", "0b11"),
    ("1:30:00", "1:30:00"),
    ("02:00:00", "02:00:00"),
    ("1-12:00:00", "1-12:00:00"),
    ("2024-01-31", "2024-01-31"),
    ("2024-01-31T10:00:00Z", "2024-01-31T10:00:00Z"),
    ("no", "no"),
    ("Yes", "Yes"),
    ("on", "on"),
    ("true", True),
    ("False", False),
    ("null", None),
    ("~", None),
    ("", None),
    ("NaN", "NaN"),
    ("<<", "<<"),
    ("inf", "inf"),
    ("'007'", "007"),
    ("!!str 7", "7"),
    ("!!float 3", 3.0),
    ("[a, 1, {b: 2}]", ["a", 1, {"b": 2}]),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_follow_the_core_schema(text, value):
    parsed = parse_yaml(f"k: {text}", "x.yaml")["k"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_nan_is_a_number():
    assert math.isnan(parse_yaml("k: .nan", "x.yaml")["k"])


def test_keys_that_yaml_1_1_reads_as_booleans_stay_text():
    assert parse_yaml("on: 1\nno: 2\n", "x.yaml") == {"on": 1, "no": 2}


def test_merge_keys_work_and_own_keys_win():
    text = "base: &b {x: 1, y: 2}\nmine: {<<: *b, y: 3}\n"
    assert parse_yaml(text, "x.yaml")["mine"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: [1, 2\n", 3, "expected ',' or ']'"),
        ("a: 1\n\tb: 2\n", 2, "tab"),
        ("a: 1\nb: c: d\n", 2, "quotes"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("a: 1\nb: !!timestamp 2024-01-01\n", 2, "!!timestamp"),
        ("a: !!python/object:os.system x\n", 1, "no place in a config"),
        ("a: 1\nb: !!int x\n", 2, "'x' is not a whole number"),
        ("a: 1\nb: !!bool yes\n", 2, "'yes' is not true or false"),
        ("a: 1\nb: *nowhere\n", 2, "undefined alias"),
        ("a: &a [*a]\n", 1, "recursive"),
        ("a: 1\nb: \x07\n", 2, "not allowed in YAML"),
    ],
)
def test_errors_carry_file_and_line(text, line, words):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "configs/x.yaml")
    assert caught.value.message.startswith(f"configs/x.yaml:{line}: ")
    assert words in caught.value.message


def test_every_duplicate_and_non_text_key_is_reported_with_its_line():
    with pytest.raises(ConfigError) as caught:
        parse_yaml("a: 1\nb: {c: 1, c: 2}\na: 3\n5: x\nnull: y\n", "x.yaml")
    assert caught.value.problems == (
        "x.yaml:2   duplicate key c, already set in line 2",
        "x.yaml:3   duplicate key a, already set in line 1",
        "x.yaml:4   keys are text, and 5 is not; put quotes around it",
        "x.yaml:5   keys are text, and null is not; put quotes around it",
    )


def test_deep_nesting_is_an_error_and_no_crash():
    with pytest.raises(ConfigError, match="nested too deeply"):
        parse_yaml("[\n" * 1500, "x.yaml")


TRICKY = [
    "1e-5",
    "no",
    "on",
    "y",
    "1:30:00",
    "null",
    "~",
    "",
    " ",
    "010",
    "0o14",
    "=",
    "<<",
    "- a",
    "a: b",
    "#",
    "x #y",
]
TRICKY += [
    "true",
    ".inf",
    ".nan",
    "2024-01-31",
    "'",
    '"',
    "\\",
    "a\nb",
    "a\n",
    "\n",
    "\n a",
    "a \nb",
    "|",
    "---",
    "...",
]
TRICKY += [
    "\u00e9\u4e2d\U0001f600",
    "\r",
    "a\r\nb",
    "\x85",
    "\u2028",
    "\ufeff",
    "\x00\x7f",
    "\t",
    "!x",
    "&x",
    "*x",
    "@",
    "%",
]


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_text_round_trips_as_value_item_and_key(text):
    value = {"k": text, "list": [text, [text]], text: 1}
    assert parse_yaml(dump_yaml(value), "x.yaml") == value


def test_random_values_round_trip_and_mean_the_same_to_a_yaml_1_1_reader():
    rng = random.Random(0)
    alphabet = (
        "ab 0123456789.:-+#'\"\\\n\t|>%&*!?{}[],~@`<=enoxNEyYtf_\u00e9\u4e2d\U0001f600\r\x85\u2028\u2029\x7f\ufeff\xa0"
    )

    def value(depth):
        kind = rng.randrange(8 if depth else 6)
        if kind == 0:
            return rng.choice([None, True, False])
        if kind == 1:
            return rng.randint(-(10**12), 10**12)
        if kind == 2:
            return rng.choice([1.0, -1.0]) * rng.random() * 10.0 ** rng.randint(-30, 30)
        if kind < 6:
            return "".join(rng.choice(alphabet) for _ in range(rng.randrange(9)))
        items = [value(depth - 1) for _ in range(rng.randrange(4))]
        return items if kind == 6 else {"".join(rng.choice(alphabet) for _ in range(5)): item for item in items}

    for _ in range(1500):
        original = value(3)
        text = dump_yaml(original)
        assert parse_yaml(text, "x.yaml") == original
        assert yaml.safe_load(text) == original


def test_tuples_are_written_as_lists_and_shared_values_without_anchors():
    shared = ["a"]
    text = dump_yaml({"t": ("x", "y"), "one": shared, "two": shared})
    assert parse_yaml(text, "x.yaml") == {"t": ["x", "y"], "one": ["a"], "two": ["a"]}
    assert "&" not in text


def test_a_multi_line_text_is_written_as_a_block():
    assert dump_yaml({"system": "one\ntwo\n"}) == "system: |\n  one\n  two\n"
