"""What the measurement of AWRS rests on: patterns that judge beginnings, and exact posteriors."""

from __future__ import annotations

import math

import pytest
import torch

from tests.conftest import tiny_model
from tokenworks.core.corpus import train_bpe
from tokenworks.core.session import Session
from tokenworks.decode.awrs import SAMPLERS
from tokenworks.decode.constraint import regex
from tokenworks.decode.smc import SMC
from tokenworks.reproduce.awrs import STEPPERS, WAYS, _figures, _table
from tokenworks.reproduce.patterns import FEW, PATTERNS, Pattern, by_text, enumerate_texts, one_of


@pytest.mark.parametrize(("name", "text"), [("date", "1999-12-31"), ("time", "23:59"), ("colour", "#00ff7a"),
                                            ("e-mail", "ann.b@mail.org"), ("price", "$19.99")])  # fmt: skip
def test_a_pattern_judges_beginnings_and_wholes(name: str, text: str) -> None:
    judge = Pattern(PATTERNS[name][0])
    assert judge.complete(text.encode())
    assert all(judge.prefix(text[:end].encode()) for end in range(len(text) + 1))
    assert not judge.prefix(b"\xc3")
    assert not judge.complete(text[:-1].encode()) or name == "price"


def test_texts_of_a_few_are_enumerated_over_all_their_tokenizations() -> None:
    tokenizer = train_bpe(["nothing to merge"], 260, special=["<end>"])
    tokenizer.eos_token = "<end>"
    session = Session(tiny_model("llama", vocab_size=260))
    here = regex(one_of(("ab", "a.", "no")), tokenizer)
    exact = enumerate_texts(session, [5, 6], here, [0], tokenizer)
    assert set(exact) == {"ab", "a.", "no"}
    plain = tiny_model("llama", vocab_size=260)
    ids = tokenizer("ab")["input_ids"]
    rows = torch.log_softmax(plain(torch.tensor([[5, 6, *ids]])).logits[0].double(), -1)
    alone = sum(float(rows[1 + n, token]) for n, token in enumerate([*ids, 0]))
    assert exact["ab"] == pytest.approx(math.exp(alone), rel=1e-3)
    found = SMC(session, SAMPLERS["masked"], 400).generate([5, 6], here, 6, [0], seed=0)
    shares, total = by_text(found.probabilities, tokenizer), sum(exact.values())
    assert all(shares.get(text, 0) == pytest.approx(p / total, abs=0.12) for text, p in exact.items())


def test_every_few_has_a_corner() -> None:
    """Some answer begins like a likely one and is none."""
    assert all(len(texts) >= 4 for texts in FEW.values())


def test_figures_follow_from_the_pieces() -> None:
    steps = [
        {"pattern": "date", "log Z": -bits, **{f"{s} checks": 5.0 + bits for s in STEPPERS},
         **{f"{s} seconds": 0.01 for s in STEPPERS}, "engine seconds": 0.001}
        | {"masked checks": 49152.0, "masked seconds": 1.0}
        for bits in range(1, 31)
    ]  # fmt: skip
    quality = [
        {"pattern": "date", "base valid": 0.0, **{f"{w} valid": 1.0 for w in WAYS},
         **{f"{w} log p": (-1.0 if w == "AWRS" else -3.0) for w in WAYS}}
    ] * 3  # fmt: skip
    fidelity = [
        {"way": way, "particles": n, "distance": 0.1 if way == "AWRS" else 0.4}
        for way in ("AWRS", "masking") for n in (1, 4, 16, 64) for _ in range(3)
    ]  # fmt: skip
    found = {f.name: f for f in _figures({"steps": steps, "quality": quality, "peer": [], "fidelity": fidelity})}
    assert found["Less time in the constraint than masking"].value == pytest.approx(100)
    assert found["Less time in the constraint than masking"].verdict == "confirmed"
    assert found["Likelier texts than masking by"].value == pytest.approx(2)
    assert found["Checks rise as the mass allowed falls (Spearman)"].value == pytest.approx(1)
    assert _table({"steps": steps, "quality": quality})[0]["checks, masked"] == 49152.0
