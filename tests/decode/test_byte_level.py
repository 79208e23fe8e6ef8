"""Byte-level: exact against enumeration, against a source whose truth is known, and against itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.conftest import tiny_model
from tokenworks.core.corpus import train_bpe
from tokenworks.core.errors import InputError
from tokenworks.core.models import load
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Session
from tokenworks.core.tree import TokenTree
from tokenworks.decode.byte_cover import Cover
from tokenworks.decode.byte_level import (
    END,
    ByteEnsemble,
    ByteLM,
    beginning,
    chat_prefixes,
    checked_text,
    infilling_ids,
    write,
)
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


class AsciiOnly(Cover):
    """Reads as the brute force does: characters beyond ASCII do not exist."""

    def _keep(self, left: tuple[int, ...], at: int, log_p: float, logits: Tensor) -> None:
        logits = logits.clone()
        logits[[t for t, p in enumerate(self.encodings.vocabulary.pieces) if p and max(p) >= 0x80]] = -torch.inf
        super()._keep(left, at, log_p, logits)


def ascii_reader(size: int = 272) -> ByteLM:
    found = reader(size)
    found.cover = AsciiOnly(found.cover.session, found.encodings, [0], 0.0)
    return found


@pytest.mark.parametrize("text", ["ban", "a b", "n  a", "\n\n", "d\n\na", "an,"])
def test_the_cover_sums_to_the_probability_of_the_text(text: str) -> None:
    found = ascii_reader()
    found.start()
    assert math.exp(found.log_probs(text).sum()) == pytest.approx(brute_force(text.encode()), rel=1e-5)


class Oracle:
    """An engine whose tokens are those of texts drawn from a list, so that every probability is known."""

    def __init__(self, known: PreTrainedTokenizerBase, texts: dict[str, float]) -> None:
        self.vocab_size = self.input_size = len(known)
        self.context_limit, self.device = 256, torch.device("cpu")
        self.tokens: list[int] = []
        self._pending: list[tuple[int, ...]] = []
        self._rows: dict[tuple[int, ...], Tensor] = {}
        for text, chance in texts.items():
            ids = (*known(text)["input_ids"], 0)
            for place, token in enumerate(ids):
                row = self._rows.setdefault(ids[:place], torch.zeros(self.vocab_size, dtype=torch.float64))
                row[token] += chance

    @property
    def length(self) -> int:
        return len(self.tokens)

    def _logits(self, path: tuple[int, ...]) -> Tensor:
        return torch.log(self._rows.get(path, torch.ones(self.vocab_size, dtype=torch.float64)))

    def prefill(self, tokens: Sequence[int], reader: Callable[[Tensor, Tensor], None] | None = None) -> Tensor:
        self.tokens += [int(token) for token in tokens]
        return self._logits(tuple(self.tokens[1:]))

    def extend(self, tokens: TokenTree) -> Tensor:
        for token, parent in zip(tokens.tokens.tolist(), tokens.shape.parents, strict=True):
            above = tuple(self.tokens) if parent < 0 else self._pending[parent]
            self._pending.append((*above, token))
        return torch.stack([self._logits(path[1:]) for path in self._pending])

    def commit(self, path: Sequence[int] | None = None) -> None:
        if path:
            self.tokens = list(self._pending[path[-1]])
        self._pending = []

    def rollback(self, length: int | None = None) -> None:
        del self.tokens[self.length if length is None else length :]
        self._pending = []


def test_the_papers_example() -> None:
    """Letters drawn one after another: after a lone token A the tokens are sure of B, the bytes are not."""
    a, letters = 0.3, {("A", "A"): 0.7, ("A", "B"): 0.3, ("B", "A"): 0.5, ("B", "B"): 0.5}
    known = train_bpe(["AA AA AA"], 258, special=["<|endoftext|>"])
    known.eos_token = "<|endoftext|>"
    chain = {}
    for text in map("".join, itertools.product("AB", repeat=8)):
        chain[text] = math.prod(letters[pair] for pair in itertools.pairwise("B" + text))
    oracle = Oracle(known, chain)
    found = ByteLM(oracle, known, tolerance=0.0)
    for text, chance in (("A", a), ("BA", a), ("AA", a), ("AAA", a), ("B", 0.5), ("", 0.5)):
        found.start(text)
        assert float(found.next_byte()[ord("B")].exp()) == pytest.approx(chance, abs=1e-9), text
        assert float(found.next_byte()[ord("A")].exp()) == pytest.approx(1 - chance, abs=1e-9), text
    lone = torch.softmax(oracle._logits((known.get_vocab()["A"],)), -1)
    assert float(lone[known.get_vocab()["B"]]) == 1.0, "what continuing the encoding alone would say"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("letters", ["AB", "a \n"])
def test_any_distribution_over_texts_comes_back(seed: int, letters: str) -> None:
    """Every text of up to five letters has a random probability; vocabularies of up to nine tokens of them."""
    random = np.random.default_rng(seed)
    words = ["".join(random.choice(list(letters), size=40)) for _ in range(20)]
    known = train_bpe(words, 257 + 2 + 2 * seed, special=["<|endoftext|>"])
    known.eos_token = "<|endoftext|>"
    texts = [text for n in range(6) for text in map("".join, itertools.product(letters, repeat=n))]
    truth = dict(zip(texts, random.dirichlet(np.ones(len(texts))).tolist(), strict=True))
    found = ByteLM(Oracle(known, truth), known, tolerance=0.0)
    for text in [texts[number] for number in random.integers(len(texts), size=12)]:
        for cut in range(len(text) + 1):
            total = sum(chance for other, chance in truth.items() if other.startswith(text[:cut]))
            found.start(text[:cut])
            row = found.next_byte().exp()
            for letter in letters:
                goes_on = sum(c for other, c in truth.items() if other.startswith(text[:cut] + letter))
                assert float(row[ord(letter)]) == pytest.approx(goes_on / total, abs=1e-9), (text[:cut], letter)
            assert float(row[END]) == pytest.approx(truth[text[:cut]] / total, abs=1e-9)
        found.start()
        logs = found.log_probs(text).sum() + float(found.next_byte()[END])
        assert logs == pytest.approx(math.log(truth[text]), abs=1e-9)


@lru_cache
def pieces() -> PreTrainedTokenizerBase:
    """SentencePiece's kind of BPE: blanks are letters, and characters without a token are bytes."""
    tokens = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abnd.é漢", "an", "▁a", "ba", "▁an"]
    merges = [("a", "n"), ("▁", "a"), ("b", "a"), ("▁", "an")]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


def of_pieces(tolerance: float = 0.0) -> ByteLM:
    return ByteLM(Session(model(len(pieces()))), pieces(), tolerance=tolerance)


def members(found: ByteLM) -> dict[tuple[int, ...], int]:
    size, cover = len(found.data), found.cover
    return {left: at for left, at in cover._lefts.items() if at == size or cover._reaches(found.data, at)}


@pytest.mark.parametrize("make", [reader, of_pieces])
@pytest.mark.parametrize("text", [TEXT, "ab  é漢🙂 an.", "x\n \n\n  and'"])
def test_going_on_is_beginning_again(make: Callable[..., ByteLM], text: str) -> None:
    """After every byte the cover is the one built from scratch, and bytes multiply to the text's probability."""
    slow, fresh, at_once = make(), make(), make()
    at_once.start()
    known = at_once.log_probs(text)
    slow.start()
    for end, byte in enumerate(text.encode()):
        row = slow.next_byte()
        assert float(torch.logsumexp(row, 0)) == pytest.approx(0, abs=1e-9)
        assert float(row[byte]) == pytest.approx(known[end], abs=1e-4)
        fresh.start(text.encode()[:end])
        torch.testing.assert_close(fresh.next_byte().exp(), row.exp(), atol=1e-6, rtol=1e-4)
        assert members(fresh) == members(slow)
        slow.advance(byte)


def test_what_is_not_tried_makes_little_difference() -> None:
    strict, loose = reader(), reader(tolerance=0.01)
    for found in (strict, loose):
        found.start()
    chance = 1.0
    for end, byte in enumerate(TEXT.encode()):
        rows = strict.next_byte().exp(), loose.next_byte().exp()
        # After a beginning that is less likely than what is not tried, the rest may matter.
        assert chance * float((rows[0] - rows[1]).abs().sum()) / 2 < 0.01 * (end + 1)
        chance *= float(rows[0][byte])
        strict.advance(byte)
        loose.advance(byte)


def test_members_are_different_and_spell_the_text() -> None:
    found = reader()
    found.start("a band\n\n")
    for left, at in members(found).items():
        assert b"a band\n\n"[:at] == found.encodings.vocabulary.join(left)
    complete = [left for left, at in members(found).items() if at == len(found.data)]
    assert len(complete) == 2, "before a letter the line breaks are two tokens, before the end one"
    assert sum(found.encodings.whole(found.data, left) for left in complete) == 1


def test_without_merges_it_is_the_model_itself() -> None:
    found, known = ascii_reader(257), tokenizer(257)
    found.start()
    ids = known(TEXT)["input_ids"]
    assert len(ids) == len(TEXT)
    with torch.inference_mode():
        rows = model(257)(torch.tensor([[0, *ids]])).logits[0].double()
    legal = [known.get_vocab()[c] for c in known.get_vocab() if c == "<|endoftext|>"]
    legal += [t for t, piece in enumerate(found.encodings.vocabulary.pieces) if piece and piece < b"\x80"]
    own = found.log_probs(TEXT)
    for place, token in enumerate(ids):
        expected = torch.log_softmax(rows[place][legal], -1)[legal.index(token)]
        assert own[place] == pytest.approx(float(expected), abs=1e-5)


def test_at_most_one_pass_a_byte() -> None:
    strict, loose = reader(), reader(tolerance=0.01)
    for found in (strict, loose):
        found.start("a ban")
        found.next_byte()
    before = strict.passes, loose.passes
    for byte in b"dana bands":
        for found in (strict, loose):
            found.advance(byte)
            found.next_byte()
    assert strict.passes - before[0] == 10
    assert loose.passes - before[1] <= 10
    strict.start()
    before = strict.passes, 0
    strict.log_probs("banana and a bandana, an ant")
    assert strict.passes <= before[0] + 2, (
        "a known text is read in one pass over itself and one over what is beside"
    )


def test_rows_of_little_weight_are_not_run() -> None:
    """A model that is sure of its token: its other spellings cost no pass."""
    known = train_bpe(["banana"] * 9, 262, special=["<|endoftext|>"])
    known.eos_token = "<|endoftext|>"
    assert len(known("banana")["input_ids"]) == 1
    texts = {"banana": 1 - 1e-6, "ban": 5e-7, "banan": 5e-7}
    found = ByteLM(Oracle(known, texts), known)
    found.start("b")
    before = found.passes
    for byte in b"anana":
        assert float(found.next_byte()[byte].exp()) > 0.999
        found.advance(byte)
    assert found.passes == before
    found.start("bana")
    assert float(found.next_byte()[ord("n")].exp()) > 0.999
    found.start("banan")
    found.advance(ord("a"))
    assert float(found.next_byte()[END].exp()) > 0.999


@pytest.mark.parametrize("make", [reader, of_pieces])
def test_a_long_text_is_not_remembered_for_ever(make: Callable[..., ByteLM]) -> None:
    found, again = make(tolerance=0.01), make(tolerance=0.01)
    written = found.generate("a ban", 90, Sampling(0.7), seed=3)
    assert written.finish_reason in ("length", "stop")
    assert len(found.cover._lefts) < 40
    again.start(b"a ban" + written.data)
    torch.testing.assert_close(again.next_byte().exp(), found.next_byte().exp(), atol=1e-2, rtol=0)


def test_the_context_ends_writing_and_a_prompt_beyond_it_is_refused() -> None:
    found = ByteLM(Session(model(), max_length=12), tokenizer(), stop_ids=[], tolerance=0.01)
    written = found.generate("a", 50)
    assert written.finish_reason == "context"
    # An encoding that just does not fit has one token more than the context holds.
    assert len(found.encodings.encode(found.data.decode(errors="replace"))) >= 11
    with pytest.raises(InputError, match=r"prompt: .* tokens do not fit the model's context of 12"):
        found.start("x" * 30)
    found.start("a")
    with pytest.raises(InputError, match=r"data: .* tokens do not fit the model's context of 12"):
        found.log_probs("x" * 30)
    assert found.data == b"a"


@pytest.mark.parametrize("make", [reader, of_pieces])
@pytest.mark.parametrize("character", ["é", "漢", "🙂", "ñ"])
def test_a_character_may_be_cut_anywhere(make: Callable[..., ByteLM], character: str) -> None:
    found = make(tolerance=0.01)
    data = b"an " + character.encode()
    for cut in range(len(data) + 1):
        found.start(data[:cut])
        row = found.next_byte().exp()
        assert torch.isfinite(row).all()
        assert float(row.sum()) == pytest.approx(1, abs=1e-9)
        legal = [byte for byte in range(256) if goes_on(data[:cut] + bytes([byte]))]
        inside = 3 < cut < len(data)
        assert float(row[legal].sum() + (0 if inside else row[END])) == pytest.approx(1, abs=1e-9)
        assert float(found.log_probs(data[cut:]).sum()) > -math.inf


def goes_on(data: bytes) -> bool:
    try:
        checked_text(data)
    except InputError:
        return False
    return True


def test_a_text_is_gone_on_with_inside_a_character() -> None:
    found, whole = reader(), reader()
    found.start(b"a \xe6")
    part = found.log_probs(b"\xbc\xa2 n")
    whole.start(b"a \xe6\xbc")
    found.start(b"a \xe6")
    found.advance(0xBC)
    torch.testing.assert_close(found.next_byte().exp(), whole.next_byte().exp(), atol=1e-6, rtol=1e-4)
    assert len(part) == 4
    with pytest.raises(InputError, match="byte: not UTF-8"):
        found.advance(ord("a"))
    with pytest.raises(InputError, match="byte: 300"):
        found.advance(300)
    with pytest.raises(InputError, match="data: not UTF-8"):
        found.log_probs(b"a")


def test_frozen_beginnings_change_nothing() -> None:
    text = "A band and a nana  ban.\n\n An ant, a plan; I can't 1 2 b 3rd  x\tan and"
    for known, size in ((tokenizer(), 272), (pieces(), len(pieces()))):
        frozen, plain = Encodings(known, size), Encodings(known, size)
        plain._reach_across = True  # type: ignore[misc]
        assert frozen._last_anchor(text.encode()) > 60
        for end in [*range(0, len(text), 3), len(text), 40]:
            assert frozen.lefts(text[:end].encode()) == plain.lefts(text[:end].encode())
            left = plain.lefts(text[:end].encode())[0]
            assert frozen.may_follow(left, range(size)).tolist() == plain.may_follow(left, range(size)).tolist()


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
    assert logs.tolist() == pytest.approx([expected, float(both.next_byte()[ord("d")])], abs=1e-2)
    assert both.read.shape == (2, 2)
    assert both.passes == one.passes + other.passes


def test_models_that_disagree_on_the_end_of_a_text_are_refused() -> None:
    endless = ByteLM(Session(model()), tokenizer(), stop_ids=[])
    with pytest.raises(InputError, match=r"members: number 1 \(from 0\) has no token that ends a text"):
        ByteEnsemble([reader(), endless])
    assert not ByteEnsemble([endless, endless]).ends
    assert ByteEnsemble([reader()]).ends


def test_a_chat_prompt_is_for_models_that_chat() -> None:
    chatty = train_bpe(WORDS, 280, special=["<|endoftext|>", "<user>", "<bot>"])
    chatty.chat_template = "<user>{{ messages[0]['content'] }}<bot>"
    own = [chatty.get_vocab()["<user>"], *chatty("an ant")["input_ids"], chatty.get_vocab()["<bot>"]]
    assert chat_prefixes([chatty, chatty], "an ant") == [own, own]
    with pytest.raises(InputError, match=r"message: of these 2 models number 1 \(from 0\) has no chat template"):
        chat_prefixes([chatty, tokenizer()], "an ant")
    with pytest.raises(InputError, match="message: empty"):
        chat_prefixes([chatty], " ")
    with pytest.raises(InputError, match="tokenizers: empty"):
        chat_prefixes([], "a")
    found = ByteLM(Session(model(280)), chatty, stop_ids=[0], tolerance=0.01)
    both = ByteEnsemble([found, ByteLM(Session(model(280, 1)), chatty, stop_ids=[0], tolerance=0.01)])
    assert both.generate(max_new_bytes=3, prefix_ids=chat_prefixes([chatty, chatty], "an ant")).data


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
    streamed: list[bytes] = []
    found.start("a ban")
    assert write(found, 6, on_bytes=streamed.append).data == b"".join(streamed)
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
    found = ByteLM(Session(model(280)), known, tolerance=0.0)
    found.start("a ba", [ids])
    after, lost = found.next_byte(), ByteLM(Session(model(280)), known, tolerance=0.0)
    lost.start("a b", [ids])
    # The text before the gap ends inside a token, and its cover is that of any other text.
    assert float(lost.log_probs("an").sum()) == pytest.approx(
        float(lost_first(lost, ids)) + float(after[ord("n")]), abs=1e-4
    )
    with pytest.raises(InputError, match="control: the tokenizer has no <x>"):
        infilling_ids(known, "and", ("<x>", "<suf>", "<mid>"))


def lost_first(found: ByteLM, ids: list[int]) -> Tensor:
    found.start("a b", [ids])
    return found.next_byte()[ord("a")]


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
    with pytest.raises(InputError, match="weights: "):
        ByteEnsemble([reader()], weights=[math.nan])
    with pytest.raises(InputError, match="stop_ids: "):
        ByteLM(Session(model()), tokenizer(), stop_ids=[999])
    with pytest.raises(InputError, match="prefix_ids: 2 sequences for 1 models"):
        reader().start("a", [[0], [0]])
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
