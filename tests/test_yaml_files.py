"""GRAMMAR, section 1: scalars, and what is not plain YAML."""

from __future__ import annotations

import math

import pytest
from conftest import Desk

from core.yaml_files import ConfigError, load_text


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1E3", 1000.0), ("1_000", 1000), ("-.5", -0.5), ("1.", 1.0), ("+1e+2", 100.0), ("0x10", 16)],
)
def test_numbers_are_numbers(text: str, value: float) -> None:
    read = load_text(f"a: {text}", "x").tree["a"]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("text", ["2020-01-01", "1e", "e3", "1.2.3", "'1e-3'", "_1"])
def test_the_rest_is_text(text: str) -> None:
    assert load_text(f"a: {text}", "x").tree["a"] == text.strip("'")


def test_an_option_that_counts_takes_no_fraction(desk: Desk) -> None:
    assert desk.wrong("train: {batch_size: 1e1}") == ["train.batch_size: 10.0 is not an integer (x.yaml:1). Write 10."]
    assert math.isclose(desk.config("optimizer: {learning_rate: 1}").optimizer.options.learning_rate, 1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!python/object/apply:os.system [ls]", "the tag '!!python/object/apply:os.system' is not allowed"),
        ("a: !!python/object/new:os.system {x: 1}", "is not allowed: a configuration holds plain values (x:1)."),
        ("a: !!binary aGk=", "the tag '!!binary' is not allowed"),
        ("a: !mine 3", "the tag '!mine' is not allowed"),
        ("a: &x [*x]", "a.0: an alias refers to a value that contains it (x:1)."),
        ("? [1]\n: 2", "a key must be a word or a number (x:1)."),
        ("- 1", "a configuration is a mapping of keys, not a list"),
        ("a: 1\n---\nb: 2", "expected a single document in the stream but found another document (x:2)."),
        ("a:\n\tb: 1", "found character '\\t' that cannot start any token (x:2)."),
        ("a: [" * 100, "x"),
    ],
)
def test_what_is_not_plain_yaml_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(text, "x")
    assert words in str(caught.value)


def test_a_bomb_of_aliases_is_refused_and_aliases_work() -> None:
    assert load_text("a: &x {b: 1}\nc: {<<: *x, d: 2}\ne: *x", "x").tree["c"] == {"b": 1, "d": 2}
    bomb = "a0: &a0 [x, x]\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))
    with pytest.raises(ConfigError, match="aliases expand to more than"):
        load_text(bomb, "x")
    assert load_text("\n" * 10_000 + "a: 1", "x").package is None
