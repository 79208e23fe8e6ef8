"""Trace: pieces that join to the text, channels that fit, and a round trip through JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenworks.core.errors import InputError
from tokenworks.core.trace import Channel, Trace


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that every character beyond ASCII is spread over several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False)


TOKENIZER = byte_tokenizer()


def sample() -> Trace:
    trace = Trace(["The", " sky", "\n", "[bold]is[/]", " blue\x1b[31m"], [5, 6, 7, 8, 9])
    trace.add("source", ["target", "draft", "draft", "target", None], "who wrote it")
    return trace.add("entropy", [1.5, 0.25, None, math.nan, 3.0], "in bits")


@given(st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_decoded_text(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    trace = Trace.from_ids(ids, TOKENIZER)
    assert len(trace) == len(ids)
    assert "".join(trace.tokens) == TOKENIZER.decode(ids)


def test_a_split_character_goes_to_the_token_that_completes_it() -> None:
    trace = Trace.from_ids(TOKENIZER("aé")["input_ids"], TOKENIZER)
    assert trace.tokens == ["a", "", "é"]
    cut = TOKENIZER("é")["input_ids"][:1]
    assert Trace.from_ids(cut, TOKENIZER).tokens == ["\ufffd"]


def test_json_round_trip_is_strict_and_exact(tmp_path: Path) -> None:
    trace = sample()
    trace.meta["title"] = "é </script>"
    trace.save(tmp_path / "t.json")
    assert Trace.load(tmp_path / "t.json") == trace
    json.loads((tmp_path / "t.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert trace.channels["entropy"].values == [1.5, 0.25, None, None, 3.0]


def test_slices_keep_values_and_scales() -> None:
    part = sample()[1:3]
    assert (part.tokens, part.token_ids) == ([" sky", "\n"], [6, 7])
    assert part.channels["entropy"].values == [0.25, None]
    assert (part.channels["entropy"].low, part.channels["entropy"].high) == (0.25, 3.0)


def test_plain_text_marks_values_and_disarms_control_characters() -> None:
    shown = sample().to_terminal("source", colour=False)
    # Two of each: the category met first is the common one, and stands bare; so does what has no value.
    assert shown.startswith("The[draft| sky\n][bold]is[/] blue")
    assert "\x1b" not in shown
    assert "source: who wrote it (target 2, draft 2)" in shown
    numbers = sample().to_terminal("entropy", colour=False)
    assert "The{1.5} sky{0.25}\n" in numbers
    assert "mean 1.58, from 0.25 to 3" in numbers


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" in sample().to_terminal("source", colour=True)
    assert "\\x1b[31m" in sample().to_terminal(
        "source", colour=True
    )  # the token's own escape is shown, not obeyed
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in sample().to_terminal("entropy")


def test_html_and_notebook() -> None:
    page = sample().to_html()
    assert page.startswith("<!doctype html>")
    assert "in bits" in page
    assert "sky" in sample()._repr_html_()


def test_empty_traces_render() -> None:
    assert Trace([]).to_terminal() == ""
    assert Trace([]).add("x", []).to_terminal(colour=True).endswith("(no values)")
    assert "<" in Trace([]).to_html()


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="channel 'x': 1 values for 5 tokens"):
        sample().add("x", [1.0])
    with pytest.raises(InputError, match="token_ids: 1 ids for 2"):
        Trace(["a", "b"], [1])
    with pytest.raises(InputError, match="mixed"):
        Channel([1.0, "a"])
    with pytest.raises(InputError, match="channel: no 'nope'"):
        sample().to_terminal("nope")
    with pytest.raises(InputError, match="not a saved Trace"):
        Trace.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"tokens": 3}')
    with pytest.raises(InputError, match="not a"):
        Trace.load(tmp_path / "bad.json")
