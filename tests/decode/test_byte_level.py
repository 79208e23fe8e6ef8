"""Byte-level: exact against enumeration, against a source whose truth is known, and against itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.conftest import tiny_model
from tokenworks.core.corpus import train_bpe
from tokenworks.core.errors import InputError
from tokenworks.core.models import load
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Session
from tokenworks.core.tree import TokenTree
from tokenworks.decode.byte_level import END, ByteEnsemble, ByteLM, beginning, checked_text, infilling_ids
from tokenworks.decode.encodings import Encodings

WORDS = ["banana band, an ant and a bandana;\n\n  ban it. naan  \n", "a man, a plan; panama has bananas"] * 3 + [
    "\n\n"
] * 40
TEXT = "a ban  an\n\nand"


@lru_cache
def tokenizer(size: int = 272) -> PreTrainedTokenizerBase:
    """Byte-level BPE with GPT-2's pattern, which looks ahead of white space. Id 0 ends a text."""
    found = train_bpe(WORDS, size, special=["<|endoftext|>"])
    found.eos_token = "<|endoftext|>"
    return found


@lru_cache
def model(size: int = 272, seed: int = 0) -> PreTrainedModel:
    return tiny_model("llama", seed, vocab_size=size, max_position_embeddings=256)


def reader(size: int = 272, seed: int = 0, tolerance: float = 0.0) -> ByteLM:
    return ByteLM(Session(model(size, seed)), tokenizer(size), tolerance=tolerance)


def brute_force(data: bytes, size: int = 272) -> float:
    """Probability that a text begins with `data`: every token sequence that could be the beginning of one."""
    known = tokenizer(size)
    encodings = Encodings(known, size)
    pieces = encodings.vocabulary.pieces
    futures = ["", "a", "x", " ", "\n", ",", "7", "ba", "  x", " ."]

    @lru_cache
    def begins(sequence: tuple[int, ...]) -> bool:
        text = encodings.vocabulary.join(sequence)
        if any(byte >= 0x80 for byte in text):
            return False  # the texts here are ASCII
        tries = (known(text.decode() + future)["input_ids"] for future in futures)
        return any(tuple(ids[: len(sequence)]) == sequence for ids in tries)

    def total(sequence: tuple[int, ...], left: bytes) -> float:
        with torch.inference_mode():
            row = torch.softmax(model(size)(torch.tensor([[0, *sequence]])).logits[0, -1].double(), -1)
        chance = torch.tensor([begins((*sequence, t)) if pieces[t] else False for t in range(size)]) * row
        ends = (
            float(row[0])
            if known(encodings.vocabulary.join(sequence).decode())["input_ids"] == list(sequence)
            else 0
        )
        chance = chance / (chance.sum() + ends)
        found = 0.0
        for token in chance.nonzero()[:, 0].tolist():
            piece = pieces[token] or b""
            if piece.startswith(left):
                found += float(chance[token])
            elif left.startswith(piece):
                found += float(chance[token]) * total((*sequence, token), left[len(piece) :])
        return found

    return total((), data)


class AsciiOnly(ByteLM):
    """Reads as the brute force does: characters beyond ASCII do not exist."""

    def _keep(self, left: tuple[int, ...], at: int, log_p: float, logits: Tensor) -> None:
        logits = logits.clone()
        logits[[t for t, p in enumerate(self.encodings.vocabulary.pieces) if p and max(p) >= 0x80]] = -torch.inf
        super()._keep(left, at, log_p, logits)


@pytest.mark.parametrize("text", ["ban", "a b", "n  a", "\n\n", "d\n\na", "an,"])
def test_the_cover_sums_to_the_probability_of_the_text(text: str) -> None:
    found = AsciiOnly(Session(model()), tokenizer(), tolerance=0.0)
    found.start()
    assert math.exp(found.log_probs(text).sum()) == pytest.approx(brute_force(text.encode()), rel=1e-5)


class Oracle:
    """An engine with the exact token probabilities of bytes drawn one after another: A after A with 1 - a."""

    def __init__(self, a: float, size: int, ids: dict[str, int]) -> None:
        self.vocab_size = self.input_size = size
        self.context_limit, self.device = 256, torch.device("cpu")
        self.tokens: list[int] = []
        self._pending: list[int] = []
        p = {("A", "A"): 1 - a, ("A", "B"): a, ("B", "A"): 0.5, ("B", "B"): 0.5}
        self._rows = {}
        for last in ("A", "B"):
            row = {"AA": p[last, "A"] * p["A", "A"], "A": p[last, "A"] * p["A", "B"], "B": p[last, "B"]}
            self._rows[last] = row
        self._after = {
            ids["AA"]: self._rows["A"],
            ids["B"]: self._rows["B"],
            ids["A"]: {"AA": 0, "A": 0, "B": 1.0},
        }
        self._ids = ids

    @property
    def length(self) -> int:
        return len(self.tokens)

    def _logits(self, token: int) -> Tensor:
        found = torch.full((self.vocab_size,), -torch.inf)
        for name, chance in self._after.get(token, self._rows["B"]).items():
            found[self._ids[name]] = math.log(chance) if chance else -torch.inf
        return found

    def prefill(self, tokens: Sequence[int], reader: Callable[[Tensor, Tensor], None] | None = None) -> Tensor:
        self.tokens += [int(token) for token in tokens]
        return self._logits(self.tokens[-1])

    def extend(self, tokens: TokenTree) -> Tensor:
        self._pending += tokens.tokens.tolist()
        return torch.stack([self._logits(token) for token in tokens.tokens.tolist()])

    def commit(self, path: Sequence[int] | None = None) -> None:
        self.tokens += [self._pending[node] for node in path or []]
        self._pending = []

    def rollback(self, length: int | None = None) -> None:
        del self.tokens[self.length if length is None else length :]
        self._pending = []


def test_a_source_whose_truth_is_known() -> None:
    """The paper's example: after a lone token A the tokenized model is sure of B, the bytes are not."""
    known = train_bpe(["AA AA AA"], 258, special=["<|endoftext|>"])
    ids = {name: known.get_vocab()[name] for name in ("A", "B", "AA")}
    oracle = Oracle(0.3, len(known), ids)
    found = ByteLM(oracle, known, stop_ids=[], tolerance=0.0)
    for text, chance in (("A", 0.3), ("BA", 0.3), ("AA", 0.3), ("AAA", 0.3), ("B", 0.5), ("", 0.5)):
        found.start(text)
        assert float(found.next_byte()[ord("B")].exp()) == pytest.approx(chance, abs=1e-6), text
        assert float(found.next_byte()[ord("A")].exp()) == pytest.approx(1 - chance, abs=1e-6), text
    lone = oracle._logits(ids["A"])
    assert float(lone[ids["B"]].exp()) == 1.0, "what continuing the encoding alone would say"


@pytest.mark.parametrize("tolerance", [0.0, 0.01])
def test_reading_byte_by_byte_is_reading_at_once(tolerance: float) -> None:
    """Incremental state equals the cover built from scratch, and bytes multiply to the text's probability."""
    at_once, slow, fresh = reader(tolerance=tolerance), reader(tolerance=tolerance), reader(tolerance=tolerance)
    at_once.start()
    known = at_once.log_probs(TEXT)
    slow.start()
    for end, byte in enumerate(TEXT.encode()):
        row = slow.next_byte()
        assert float(torch.logsumexp(row, 0)) == pytest.approx(0, abs=1e-9)
        # What is not checked at a tolerance leaks a little, at each place a little else.
        slack = 2e-3 if tolerance else 1e-4
        assert float(row[byte]) == pytest.approx(known[end], abs=slack)
        fresh.start(TEXT[:end])
        torch.testing.assert_close(fresh.next_byte().exp(), row.exp(), atol=slack, rtol=1e-3)
        slow.advance(byte)


def test_members_are_different_and_spell_the_text() -> None:
    found = reader()
    found.start("a band\n\n")
    lefts = [row.left for row in found._rows]
    assert len(set(lefts)) == len(lefts)
    for row in found._rows:
        assert b"a band\n\n".startswith(found.encodings.vocabulary.join(row.left))
    complete = [row.left for row in found._rows if row.at == len(found.data)]
    assert len(complete) == 2, "before a letter the line breaks are two tokens, before the end one"
    assert sum(found.encodings.whole(found.data, left) for left in complete) == 1


def test_without_merges_it_is_the_model_itself() -> None:
    found, known = reader(257), tokenizer(257)
    found.start()
    ids = known(TEXT)["input_ids"]
    assert len(ids) == len(TEXT)
    with torch.inference_mode():
        rows = model(257)(torch.tensor([[0, *ids]])).logits[0].double()
    own = found.log_probs(TEXT)
    for place, byte in enumerate(TEXT.encode()):
        # What is not UTF-8 is no text, so it is left out of the sum.
        legal = [known.get_vocab()[c] for c in known.get_vocab() if len(c) == 1 and ord(c) < 0x80] + [0]
        assert (
            own[place]
            <= float(torch.log_softmax(rows[place], -1)[ids[place]])
            + math.log(1 / float(torch.softmax(rows[place], -1)[legal].sum()))
            + 1e-6
        ), chr(byte)


def test_one_pass_a_byte() -> None:
    found = reader(tolerance=0.01)
    found.start("a ban")
    before = found.passes
    for byte in b"dana":
        found.next_byte()
        found.advance(byte)
    assert found.passes == before + 4
    found.start()
    before = found.passes
    found.log_probs("banana and a bandana, an ant")
    assert found.passes == before + 1, "a known text is read in one pass over a tree"


def test_an_ensemble_of_one_is_its_member_and_order_does_not_matter() -> None:
    def members() -> list[ByteLM]:
        return [reader(tolerance=0.01), ByteLM(Session(model(280, 1)), tokenizer(280), tolerance=0.01)]

    alone, (one, other) = reader(tolerance=0.01), members()
    both, turned = ByteEnsemble([one, other]), ByteEnsemble(members()[::-1])
    first = ByteEnsemble(members(), weights=[1, 0])
    twice = ByteEnsemble([reader(tolerance=0.01), reader(tolerance=0.01)])
    for each in (alone, both, turned, first, twice):
        each.start("a")
    torch.testing.assert_close(first.next_byte(), alone.next_byte())
    torch.testing.assert_close(twice.next_byte(), alone.next_byte())
    torch.testing.assert_close(both.next_byte(), turned.next_byte())
    mean = (one.next_byte().exp() + other.next_byte().exp()) / 2
    torch.testing.assert_close(both.next_byte().exp(), mean)
    assert not torch.allclose(mean, alone.next_byte().exp(), atol=1e-3)
    logs = both.log_probs("nd")
    both.start("a")
    expected = float(both.next_byte()[ord("n")])
    both.advance(ord("n"))
    assert logs.tolist() == pytest.approx([expected, float(both.next_byte()[ord("d")])], abs=1e-4)


@pytest.mark.model
def test_smollm2_mends_a_word_that_was_cut() -> None:
    loaded = load("smollm2-135m")
    found = ByteLM(Session(loaded.model), loaded.tokenizer)
    assert found.generate("The capital of Fran", 14).text.startswith("ce is Paris")
    found.start("The capital of Fran")
    naive = loaded.tokenizer("The capital of Fran")["input_ids"]
    with torch.inference_mode():
        row = torch.softmax(loaded.model(torch.tensor([[0, *naive]])).logits[0, -1], -1)
    starts = [t for t, p in enumerate(found.encodings.vocabulary.pieces) if p and p[:1] == b"c"]
    assert float(found.next_byte()[ord("c")].exp()) > 0.95 > float(row[starts].sum())


@pytest.mark.model
@pytest.mark.parametrize("character", ["é", "漢", "🙂"])
def test_inside_a_character_only_its_next_bytes_can_follow(character: str) -> None:
    loaded = load("smollm2-135m")
    found = ByteLM(Session(loaded.model), loaded.tokenizer)
    for cut in range(1, len(character.encode())):
        found.start(b"A sign: " + character.encode()[:cut])
        row = found.next_byte().exp()
        assert torch.isfinite(row).all()
        assert float(row[0x80:0xC0].sum()) > 0.99


def test_writing_stops_and_leaves_a_trace() -> None:
    found = reader(tolerance=0.01)
    one = found.generate("a ban", 12, Sampling(1.0), seed=1)
    assert one.data == found.generate("a ban", 12, Sampling(1.0), seed=1).data
    assert found.data == b"a ban" + one.data
    trace = one.trace()
    assert len(trace) == len(one.data)
    assert set(trace.channels) == {"probability", "entropy"}
    both = ByteEnsemble([found, ByteLM(Session(model(280, 1)), tokenizer(280), tolerance=0.01)])
    names = both.generate("a ban", 6).trace(["one", "other"])
    assert set(names.channels["surest"].values) <= {"one", "other"}
    assert all(0 <= p <= 1 for p in names.channels["other"].values)


def test_the_end_of_a_text_has_its_probability() -> None:
    found = reader()
    found.start("an")
    with torch.inference_mode():
        ids = tokenizer()("an")["input_ids"]
        own = torch.softmax(model()(torch.tensor([[0, *ids]])).logits[0, -1].double(), -1)[0]
    assert 0.2 * float(own) < float(found.next_byte()[END].exp()) <= 1


def test_infilling_puts_what_follows_first() -> None:
    known = train_bpe(WORDS, 280, special=["<|endoftext|>", "<pre>", "<suf>", "<mid>"])
    known.eos_token = "<|endoftext|>"
    ids = infilling_ids(known, "and", ("<pre>", "<suf>", "<mid>"))
    assert ids == [0, 1, 2, *known("and")["input_ids"], 3]
    with pytest.raises(InputError, match="control: the tokenizer has no <x>"):
        infilling_ids(known, "and", ("<x>", "<suf>", "<mid>"))


@pytest.mark.parametrize("text", [b"a\xff", b"\x80", b"ab\xe6\x41", b"\xc0\xaf"])
def test_what_is_not_utf8_is_refused(text: bytes) -> None:
    with pytest.raises(InputError, match="prompt: not UTF-8; byte 0x"):
        reader().start(text)


def test_misuse() -> None:
    assert checked_text("漢".encode()[:2]) == b"\xe6\xbc"
    with pytest.raises(InputError, match="tolerance: 1 is not in"):
        reader(tolerance=1)
    with pytest.raises(InputError, match="members: empty"):
        ByteEnsemble([])
    with pytest.raises(InputError, match="weights: "):
        ByteEnsemble([reader()], weights=[-1])
    with pytest.raises(InputError, match="max_new_bytes: 0"):
        reader().generate("a", 0)
    with pytest.raises(InputError, match="prefix_ids: 2 sequences for 1 models"):
        ByteEnsemble([reader()]).start("a", [[0], [0]])
    assert beginning(tokenizer()) == [0]
    nameless = train_bpe(WORDS, 270)
    with pytest.raises(InputError, match="prefix_ids: this tokenizer has no token that begins a text"):
        ByteLM(Session(model()), nameless).start("a")


def test_pairs_that_may_follow_are_those_that_encodings_hold() -> None:
    """Against the encodings of random texts."""
    encodings, random = Encodings(tokenizer(), 272), np.random.default_rng(0)
    seen: dict[tuple[int, ...], set[int]] = {}
    for _ in range(1500):
        ids = encodings.encode("".join(random.choice(list("abnd ,\n"), size=8)))
        for place in range(1, len(ids)):
            seen.setdefault(tuple(ids[:place]), set()).add(ids[place])
    for left in list(seen)[::80]:
        allowed = encodings.may_follow(left, list(range(272)))
        assert all(allowed[token] for token in seen[left])
        for token in np.flatnonzero(allowed)[::9]:
            text = encodings.vocabulary.join([*left, int(token)])
            if text.isascii():
                tries = (
                    encodings.encode(text.decode() + f)[: len(left) + 1] for f in ("", "a", " ", "1", ".", "\n")
                )
                assert [*left, token] in list(tries)
