"""Constraints: what is allowed, where a text may end, and what is said about one that cannot be."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerBase

from tokenworks.core.byte_vocab import ByteVocab
from tokenworks.core.corpus import train_bpe
from tokenworks.core.errors import InputError
from tokenworks.decode.constraint import Constraint, FunctionConstraint, grammar, json_schema, regex


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found = train_bpe(["the year 2024, the month, yes and no"], 320, special=["<end>"])
    found.eos_token = "<end>"
    return found


def walk(constraint: Constraint, tokenizer: PreTrainedTokenizerBase, text: str) -> Constraint | None:
    """What may follow `text`, or None if it is refused on the way."""
    for token in tokenizer(text)["input_ids"]:
        if not constraint.allows(token):
            return None
        constraint = constraint.after(token)
    return constraint


def accepts(constraint: Constraint, tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    end = walk(constraint, tokenizer, text)
    return end is not None and end.complete


def test_a_regex_is_matched_from_end_to_end(tokenizer: PreTrainedTokenizerBase) -> None:
    years = regex(r"[0-9]{4}|é+", tokenizer)
    assert accepts(years, tokenizer, "2024")
    assert accepts(years, tokenizer, "éé")
    for wrong in ("202", "20244", "year"):
        assert not accepts(years, tokenizer, wrong)
    assert walk(years, tokenizer, "20") is not None, "a beginning is allowed"
    assert not years.complete, "walking did not change it"


def test_the_mask_says_what_allows_says(tokenizer: PreTrainedTokenizerBase) -> None:
    years = regex("ye(s|ar)", tokenizer)
    for constraint in (
        years,
        years.after(tokenizer("y")["input_ids"][0]),
        json_schema({"enum": ["year"]}, tokenizer),
    ):
        mask = constraint.mask()
        assert mask.any()
        assert mask[: len(tokenizer)].tolist() == [constraint.allows(token) for token in range(len(tokenizer))]


def test_a_json_schema(tokenizer: PreTrainedTokenizerBase) -> None:
    schema = {"type": "object", "properties": {"year": {"type": "integer"}}, "required": ["year"]}
    for given in (schema, json.dumps(schema)):
        found = json_schema(given, tokenizer)
        assert accepts(found, tokenizer, '{"year":2024}')
        assert not accepts(found, tokenizer, '{"year":"no"}')
        assert not accepts(found, tokenizer, "{}")


def test_a_grammar_counts_brackets(tokenizer: PreTrainedTokenizerBase) -> None:
    found = grammar('start: "x" | "(" start ")"', tokenizer)
    assert accepts(found, tokenizer, "((x))")
    assert not accepts(found, tokenizer, "((x)")
    assert not accepts(found, tokenizer, "(x))")


def even(text: bytes) -> bool:
    return len(text) % 2 == 0


def test_any_function_on_bytes(tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = ByteVocab.from_tokenizer(tokenizer)
    found = FunctionConstraint(lambda text: text.isascii(), even, vocabulary)
    assert accepts(found, tokenizer, "no")
    assert not accepts(found, tokenizer, "yes")
    assert not accepts(found, tokenizer, "é")
    assert not found.allows(0), "a control token is no text"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda t: regex("[a", t), "regex: .*unclosed"),
        (lambda t: regex("", t), "regex: empty"),
        (lambda t: regex("(?=a)b", t), "regex: .*look-around"),
        (lambda t: regex("[a&&b]", t), "regex: no text satisfies it"),
        (lambda t: grammar("start: foo", t), r'grammar: .*unknown name: "foo"'),
        (lambda t: grammar('start: "a', t), "grammar: "),
        (lambda t: grammar(" ", t), "grammar: empty"),
        (lambda t: json_schema("{", t), "json-schema: not JSON"),
        (lambda t: json_schema("[]", t), "json-schema: expected an object"),
        (lambda t: json_schema({"type": "nope"}, t), "json-schema: .*nope"),
        (lambda t: json_schema({"type": "string", "minLength": 5, "maxLength": 3}, t), "json-schema: Unsat"),
        (lambda t: json_schema({"type": "integer", "minimum": 5, "maximum": 3}, t), "json-schema: "),
    ],
)
def test_what_cannot_be_is_refused_at_once(make, said: str, tokenizer: PreTrainedTokenizerBase) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=f"(?s)^{said}"):
        make(tokenizer)


def test_a_regex_that_would_backtrack_for_ever_is_quick(tokenizer: PreTrainedTokenizerBase) -> None:
    assert not accepts(regex("(a+)+b", tokenizer), tokenizer, "a" * 2000)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda text: 1 / 0, "constraint: it raised ZeroDivisionError"),
        (lambda text: None, "constraint: it returned None"),
        (lambda text: False, "constraint: refuses even the beginning"),
    ],
)
def test_functions_that_fail(function, said: str, tokenizer: PreTrainedTokenizerBase) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=said):
        FunctionConstraint(function, even, ByteVocab.from_tokenizer(tokenizer))
