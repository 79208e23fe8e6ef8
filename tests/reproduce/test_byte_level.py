"""What the byte-level measurement rests on: cuts where they should be, and baselines that do what they say."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tests.conftest import tiny_model
from tokenworks.core.corpus import train_bpe
from tokenworks.core.session import Session
from tokenworks.decode.byte_level import ByteLM
from tokenworks.reproduce.byte_baselines import Baselines, complete_bytes
from tokenworks.reproduce.byte_level import figures, table
from tokenworks.reproduce.byte_texts import NAME, cut_line, cut_token, passage

MODELS = ("smollm2-135m", "gemma-3-270m")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found = train_bpe(["banana band and a bandana, an ant"] * 20, 270, special=["<end>"])
    found.eos_token = "<end>"
    return found


@pytest.fixture(scope="module")
def plain(tokenizer: PreTrainedTokenizerBase) -> Baselines:
    model = tiny_model("llama", vocab_size=270)
    reader = ByteLM(Session(model), tokenizer, tolerance=0.0)
    return Baselines(reader, Session(model), tokenizer)


def test_cuts_are_inside_tokens_or_between(tokenizer: PreTrainedTokenizerBase) -> None:
    def pieces(text: str) -> list[int]:
        return [len(tokenizer.decode([token])) for token in tokenizer(text)["input_ids"]]

    for inside in (True, False):
        cut = cut_token("English", pieces, inside, random.Random(1))
        ends = np.cumsum(pieces(cut.prompt + cut.rest)).tolist()
        assert (len(cut.prompt) in ends) is not inside


def test_lines_are_cut_inside_a_name() -> None:
    for seed in range(5):
        cut = cut_line(24, random.Random(seed))
        assert 0 < len(cut.rest) <= 24
        assert "\n" not in cut.rest
        line = cut.prompt.rpartition("\n")[2] + cut.rest
        place = len(line) - len(cut.rest)
        assert any(name.start() < place < name.end() for name in NAME.finditer(line))
    assert len(passage("code", 60, random.Random(0))) == 60


def test_naive_goes_on_from_the_encoding(plain: Baselines, tokenizer: PreTrainedTokenizerBase) -> None:
    found = plain.naive("a ban")
    assert found.shape == (256,)
    assert found.sum() == pytest.approx(1)
    ids = [*plain._prefix, *tokenizer("a ban")["input_ids"]]
    p = torch.softmax(tiny_model("llama", vocab_size=270)(torch.tensor([ids])).logits[0, -1].double(), -1)
    spelled = [plain.pieces[token] for token in range(270)]
    mine = sum(float(p[t]) for t, piece in enumerate(spelled) if piece and piece[0] == ord("d"))
    assert found[ord("d")] == pytest.approx(mine / sum(float(p[t]) for t, s in enumerate(spelled) if s), rel=1e-4)


def test_healing_keeps_what_was_spelled(plain: Baselines, tokenizer: PreTrainedTokenizerBase) -> None:
    """The byte after a healed token is that of a longer one, or of what follows the same one."""
    found = plain.healing("a ban")
    assert found.sum() == pytest.approx(1)
    *_, last = tokenizer("a ban")["input_ids"]
    dropped = plain.pieces[last]
    longer = {piece[len(dropped)] for piece in plain.pieces if piece and dropped and piece.startswith(dropped)
              and len(piece) > len(dropped)}  # fmt: skip
    assert longer
    assert all(found[byte] > 0 for byte in longer)


def test_completions_stop_at_the_line_and_the_limit(plain: Baselines, tokenizer: PreTrainedTokenizerBase) -> None:
    reader = ByteLM(Session(tiny_model("llama", vocab_size=270)), tokenizer, tolerance=0.0)
    for written in (plain.complete("a ban", 7), plain.complete("a ban", 7, heal=True),
                    complete_bytes(reader, "a ban", 7)):  # fmt: skip
        assert len(written) <= 7
        assert b"\n" not in written


def test_figures_follow_from_the_pieces() -> None:
    def cut(model: str, exact: float) -> dict[str, object]:
        bits = {"naive": 6.0, "healing": 2.0, "exact": exact}
        return {"model": model, "bits": bits, "right": dict.fromkeys(bits, False)}

    def line(model: str, right: bool) -> dict[str, object]:
        ways = {"naive": False, "healing": False, "exact": right}
        return {"model": model, "right": ways, "seconds": dict.fromkeys(ways, 1.0),
                "bytes": dict.fromkeys(ways, 8), "passes": 4}  # fmt: skip

    pieces = {
        "inside": [cut(model, 1.0) for model in MODELS for _ in range(4)],
        "between": [cut(model, 6.0) for model in MODELS for _ in range(4)],
        "lines": [line(model, True) for model in MODELS for _ in range(4)],
        "passages": [{"kind": "code", "bytes": 100, "bits": {MODELS[0]: 120.0, MODELS[1]: 110.0, "both": 100.0}}]
        * 4,
        "checks": [{"distance": 1e-5}],
    }
    found = {f.name: f for f in figures(pieces)}
    assert found[f"Inside a token, fewer bits for the next byte than naive, {MODELS[0]}"].value == 5.0
    assert found[f"Fewer bits a byte than the better model alone ({MODELS[1]})"].value == pytest.approx(0.1)
    assert found[f"Bytes for each forward pass, {MODELS[0]}"].value == 2.0
    assert all(f.verdict == "confirmed" for f in found.values())
    assert any(row["what"] == "lines" and row["value"] == "4 of 4" for row in table(pieces))
