"""The reasoner's questions and checker, and words planted in texts."""

from __future__ import annotations

import pytest
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from tokenworks.reproduce.planted import ANTONYMS, plant
from tokenworks.reproduce.reasoner import (
    LONGEST,
    Question,
    answer,
    first_wrong,
    is_right,
    questions,
    reasoner_tokenizer,
    rows,
)


def test_questions_of_one_split_are_in_no_other() -> None:
    found = {split: {q.prompt for q in questions(split, 400)} for split in ("train", "lessons", "test")}
    assert not found["train"] & found["test"]
    assert not found["lessons"] & (found["train"] | found["test"])
    assert questions("test", 5) == questions("test", 5)
    assert questions("test", 5, seed=1) != questions("test", 5)


def test_every_chain_is_right_and_fits() -> None:
    for question in questions("train", 300):
        assert is_right(question.prompt)(question.chain)
        assert len(question.chain) + 1 <= LONGEST
        for step in question.chain.split(";")[:-1]:
            left, right = step.split("=")
            assert eval(left.lstrip("0") or "0") == int(right)  # sums of our own making
        assert "=-" not in question.chain


def test_the_checker() -> None:
    right = is_right("37+58-21+46:")
    assert right("37+58=95;95-21=74;74+46=120;#120")
    assert right("nonsense #120")
    for wrong in ("37+58=95;95-21=74;74+46=120;#121", "120", "", "#", "#1200"):
        assert not right(wrong)
    assert answer("#7") == "7"
    assert answer("7") == ""
    assert first_wrong("37+58=94", "37+58=95;") == 7
    assert first_wrong("37+58=95;", "37+58=95;") is None
    assert first_wrong("ab", "a") == 1


def test_only_answers_are_learned() -> None:
    tokenizer = reasoner_tokenizer()
    own = [Question("12+34-10+11:", "12+34=46;#46"), Question("12+34-10+11:", "#4")]
    ids, labels = rows([(q.prompt, q.chain) for q in own], tokenizer)
    for row, question in enumerate(own):
        inside = labels[row] != -100
        assert tokenizer.decode(labels[row][inside]) == question.chain + "<end>"
        assert (ids[row][inside] == labels[row][inside]).all()


def test_antonyms_have_opposite_values() -> None:
    lexicon = SentimentIntensityAnalyzer().lexicon
    assert len(ANTONYMS) > 60
    assert all(lexicon[good] > 0 > lexicon[bad] for good, bad in ANTONYMS.items())


def test_a_word_is_planted_and_found_again() -> None:
    tokenizer = reasoner_tokenizer()
    texts = [("It is", " a good film, and goodness is great."), ("It is", " plain.")]
    found = plant(texts + texts)
    assert [each.edited for each in found] == [
        " a bad film, and goodness is great.", " a good film, and goodness is terrible.",
    ]  # fmt: skip
    for each, word in zip(found, ("bad", "terrible"), strict=True):
        assert each.edited[each.start : each.end] == word
        ids, inside = each.tokens(tokenizer)
        assert tokenizer.decode([token for token, own in zip(ids, inside, strict=True) if own]) == word


@pytest.mark.model
def test_a_planted_word_of_the_model_is_whole() -> None:
    from tokenworks.core.models import load

    tokenizer = load("smollm2-135m").tokenizer
    for each in plant([("It is", " a peaceful place, delightful and elegant.")]):
        ids, inside = each.tokens(tokenizer)
        word = tokenizer.decode([token for token, own in zip(ids, inside, strict=True) if own])
        assert word.strip() == each.edited[each.start : each.end]
