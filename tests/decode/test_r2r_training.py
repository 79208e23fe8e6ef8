"""R2R's training: labels stand where the small model chose, the threshold where it was asked for, and a router is
bound to the model it was trained for."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.conftest import tiny_model
from tokenworks.core import training as core_training
from tokenworks.core.corpus import train_bpe
from tokenworks.core.errors import InputError
from tokenworks.core.measure import auc
from tokenworks.core.session import Session
from tokenworks.decode import r2r_data, r2r_training
from tokenworks.decode.distil import small_copy
from tokenworks.decode.draft_model import DraftModel
from tokenworks.decode.r2r import RoutedDecoder
from tokenworks.decode.r2r_data import (
    RoutingData,
    answered_places,
    build_routing_data,
    fingerprint,
    label_answer,
)
from tokenworks.decode.r2r_routers import SmallStep, TokenRouter
from tokenworks.decode.r2r_sentences import SENTENCE, ends_sentence, sentence
from tokenworks.decode.r2r_training import (
    balance,
    calibrate,
    load_router,
    make_router,
    routing_loss,
    save_router,
    train_router,
)
from tokenworks.decode.speculative import SpeculativeDecoder

SIZE = 300


@pytest.fixture(scope="module")
def large() -> PreTrainedModel:
    return tiny_model("llama", seed=5, vocab_size=SIZE, max_position_embeddings=256)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(["hello world, this is a tokenizer. so it is."] * 9, 275)


@pytest.fixture
def small(large: PreTrainedModel) -> DraftModel:
    vocabulary = torch.arange(299, 99, -1)
    return DraftModel(Session(small_copy(large, (0, 2), vocabulary)), SIZE, vocabulary)


def answer_of(model: PreTrainedModel, count: int = 80) -> list[int]:
    return [3, 1, 4, *SpeculativeDecoder(Session(model)).generate([3, 1, 4], count).token_ids]


# Guarantee 8


def test_labels_are_the_verifiers_at_mismatches_and_none_is_asked_elsewhere(
    large: PreTrainedModel, small: DraftModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = answer_of(large)
    places = list(range(3, 40))
    asked: list[tuple[str, str, str]] = []

    def verifier(*sentences: str) -> int | None:
        asked.append(sentences)  # type: ignore[arg-type]
        return (1, 0, None)[len(asked) % 3]

    data = label_answer(Session(large), small, tokenizer, tokens, places, verifier, 7)
    expected: list[tuple[str, str, str]] = []
    rows: list[tuple[int, bool, bool, Tensor, Tensor]] = []
    model: PreTrainedModel = small.session.model  # type: ignore[attr-defined]
    with torch.inference_mode():
        out = model(torch.tensor([tokens]), output_hidden_states=True)
    for place in places:
        logits, state = out.logits[0, place - 1], out.hidden_states[-1][0, place - 1]
        index = int(logits.argmax())
        chosen, label = int(small.vocabulary[index]), 0
        if chosen != tokens[place]:
            rest = SpeculativeDecoder(Session(large)).generate([*tokens[:place], chosen], SENTENCE).token_ids
            expected.append(
                (
                    tokenizer.decode(tokens[:place]),
                    sentence(tokenizer, [chosen, *rest]),
                    sentence(tokenizer, tokens[place:]),
                )
            )
            label = (1, 0, -1)[len(expected) % 3]
        if label >= 0:
            rows.append((index, chosen != tokens[place], label == 1, state, logits))
    assert asked == expected
    assert len(expected) > 10
    assert data.index.tolist() == [row[0] for row in rows]
    assert data.mismatch.tolist() == [row[1] for row in rows]
    assert data.divergent.tolist() == [row[2] for row in rows]
    assert data.answer.tolist() == [7] * len(rows)
    torch.testing.assert_close(data.hidden.float(), torch.stack([row[3] for row in rows]), atol=1e-2, rtol=1e-2)
    top = torch.stack([row[4].topk(100).values for row in rows])
    torch.testing.assert_close(data.top_logits.float(), top, atol=1e-2, rtol=1e-2)


def test_a_model_beside_itself_has_nothing_to_label(
    large: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    def never(*_: str) -> int:
        raise AssertionError("asked")

    same = DraftModel(Session(large), SIZE)
    data = label_answer(Session(large), same, tokenizer, answer_of(large), range(3, 40), never)
    assert len(data) == 37
    assert not data.mismatch.any()
    assert not data.divergent.any()


def test_a_sentence_ends_at_a_separator_or_after_so_many_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("hello world. so it is")["input_ids"]
    assert sentence(tokenizer, ids) == "hello world."
    (comma,) = tokenizer(",")["input_ids"]
    assert sentence(tokenizer, [comma] * 99) == "," * SENTENCE
    assert not ends_sentence(tokenizer, comma)
    assert ends_sentence(tokenizer, tokenizer("\n")["input_ids"][0])


def test_answers_are_what_the_model_chose_after_a_request() -> None:
    class Chat:
        chat_template = "so"

        def apply_chat_template(self, message: list[dict[str, str]], **_: object) -> str:
            return "<" + message[0]["content"] + ">"

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

    text = "<ab cd>efg<h>ij" + "." * SENTENCE
    free = [c in "bcdefg.ij" for c in text]
    tokens = [ord(c) for c in text]
    found = answered_places(tokens, free, Chat())  # type: ignore[arg-type]
    assert "".join(text[place] for place in found) == "efgij."
    Chat.chat_template = None  # type: ignore[assignment]
    plain = answered_places(tokens, [n > 3 for n in range(len(text))], Chat())  # type: ignore[arg-type]
    assert plain == list(range(4, len(text) - SENTENCE + 1))


def test_labelling_goes_on_where_it_was_cut_off_and_adds_rows(
    large: PreTrainedModel,
    small: DraftModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(r2r_data, "ROWS", 2)
    calls: list[str] = []

    def verifier(context: str, ours: str, theirs: str) -> int:
        calls.append(ours)
        return len(ours) % 2

    class Cut(Exception):
        pass

    def cut(done: int, total: int, what: str) -> None:
        if (done, what) == (2, "labelling"):
            raise Cut

    def build(folder: str, rows: int, **more: object) -> RoutingData:
        return build_routing_data(
            large,
            small,
            tokenizer,
            tmp_path / folder,
            rows,
            40,
            verifier,
            **more,  # type: ignore[arg-type]
        )

    whole = build("whole", 3)
    in_all = len(calls)
    with pytest.raises(Cut):
        build("parts", 3, progress=cut)
    parts = build("parts", 3)
    assert len(calls) == 2 * in_all, "no sentence was compared again"
    for name in ("hidden", "top_logits", "index", "mismatch", "divergent", "answer"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    assert set(whole.answer.tolist()) == {0, 1, 2}
    assert len(build("parts", 4)) > len(whole)
    with pytest.raises(InputError, match="rows: 0"):
        build("whole", 0)
    with pytest.raises(InputError, match="length: 32"):
        build_routing_data(large, small, tokenizer, tmp_path, 1, SENTENCE)


# Guarantees 6 and 7


def test_the_threshold_has_the_fewest_false_alarms_of_those_that_find_enough() -> None:
    scores = torch.tensor([0.9, 0.8, 0.6, 0.3, 0.7, 0.5, 0.2, 0.1, 0.05, 0.05])
    divergent = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0, 0]).bool()
    # All four are found at 0.3 and below, with two false alarms in ten; three at 0.6, with one.
    assert 0.29 < calibrate(scores, divergent, 0.95, 0.5) <= 0.3
    assert 0.59 < calibrate(scores, divergent, 0.75, 0.1) <= 0.6
    assert 0.79 < calibrate(scores, divergent, 0.5, 0.1) <= 0.8
    assert 0.29 < calibrate(scores, divergent, 0.95, 0.1) <= 0.3, "too many false alarms give way to recall"
    with pytest.warns(UserWarning, match="no threshold finds 95%"):
        assert calibrate(torch.zeros(10), divergent) == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(scores, divergent)


def test_the_loss_in_closed_form() -> None:
    divergent = torch.tensor([True, False, False, False])
    weight = balance(divergent)
    assert float(weight) == 3
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    p = torch.sigmoid(logits)
    expected = -(3 * p[0].log() + (1 - p[1:]).log().sum()) / 4
    assert float(routing_loss(logits, divergent, weight)) == pytest.approx(float(expected))


def test_embeddings_are_a_copy_that_is_not_trained() -> None:
    table = torch.randn(50, 8, requires_grad=True)
    router = TokenRouter(table, 12, width=16)
    router(torch.randn(4, 12), torch.randn(4, 50), torch.tensor([1, 2, 3, 4])).sum().backward()
    assert table.grad is None
    assert not router.embeddings.requires_grad
    assert router.embeddings.data_ptr() != table.data_ptr()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in router.named_parameters() if "weight" in n
    )
    assert "embeddings" not in router.state_dict()


def test_every_input_of_the_router_counts() -> None:
    torch.manual_seed(0)
    router = TokenRouter(torch.randn(50, 8), 12, width=16).eval()
    hidden, top, index = torch.randn(1, 12), torch.randn(1, 50), torch.tensor([3])
    with torch.inference_mode():
        base = float(router(hidden, top, index))
        for changed in ((hidden.flip(1), top, index), (hidden, 2 * top, index), (hidden, top, index + 1)):
            assert float(router(*changed)) != base


def test_a_score_is_what_training_saw(large: PreTrainedModel, small: DraftModel) -> None:
    """The same place, once as a row of the training data and once as a step of the decoder."""
    tokens = answer_of(large)
    data = label_answer(Session(large), small, train_bpe(["a. b"] * 9, 270), tokens, [30, 31], lambda *_: 1)
    torch.manual_seed(0)
    router = TokenRouter(r2r_training._embeddings(small), 32, 16, 1).eval()
    with torch.inference_mode():
        trained = torch.sigmoid(router(data.hidden.float(), data.top_logits.float(), data.index))
    for row, place in enumerate((30, 31)):
        found = RoutedDecoder(small, Session(large), router).generate(tokens[:place], 1)
        assert found.scores[0] == pytest.approx(float(trained[row]), abs=2e-2)


# Training


def planted(rows: int = 10, tokens: int = 120, d: int = 32, size: int = 200) -> RoutingData:
    """Divergent where the first state is large: something that can be learned, also on other rows."""
    random = torch.Generator().manual_seed(0)
    count = rows * tokens
    hidden = torch.randn(count, d, generator=random)
    hidden[:, 0] *= 4
    divergent = hidden[:, 0] > 3
    mismatch = divergent | (torch.rand(count, generator=random) < 0.2)
    top = torch.randn(count, 100, generator=random).sort(-1, descending=True).values
    index = torch.randint(size, (count,), generator=random)
    return RoutingData(hidden.half(), top.half(), index, mismatch, divergent, torch.arange(count) // tokens)


def test_it_learns_and_is_measured_on_rows_it_has_not_seen(small: DraftModel) -> None:
    data = planted()
    router, found = train_router(small, data, steps=60, learning_rate=3e-3, width=32, depth=1)
    assert found["auc"] > 0.9
    assert found["identical"] + found["neutral"] + found["divergent"] == pytest.approx(1)
    test = data[data.answer % 5 == 4]
    with torch.inference_mode():
        scores = torch.sigmoid(router(test.hidden.float(), test.top_logits.float(), test.index))
    assert found["share"] == pytest.approx(float((scores >= router.threshold).float().mean()))
    assert found["auc"] == pytest.approx(auc(scores, test.divergent))
    again, _ = train_router(small, data, steps=60, learning_rate=3e-3, width=32, depth=1)
    assert all(torch.equal(a, b) for a, b in zip(router.parameters(), again.parameters(), strict=True))
    # Rows for measuring do not change what is learned.
    other = planted()
    other.divergent[other.answer % 5 == 4] ^= other.hidden[other.answer % 5 == 4, 1] > 0
    third, worse = train_router(small, other, steps=60, learning_rate=3e-3, width=32, depth=1)
    assert torch.equal(third.leave[1].weight, router.leave[1].weight)
    assert (third.threshold, worse["auc"] < 0.9) == (router.threshold, True)


def test_the_weights_of_the_least_validation_loss_are_kept(
    small: DraftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruined(model: torch.nn.Module, loss: object, steps: int, rate: float, **more: object) -> list[float]:
        found = core_training.fit(model, loss, steps, rate, **more)  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        more["progress"](steps, steps, "ruined")  # type: ignore[operator]
        return found

    monkeypatch.setattr(r2r_training, "fit", ruined)
    _, found = train_router(small, planted(), steps=40, learning_rate=3e-3, width=32, depth=1)
    assert found["auc"] > 0.8


def test_data_of_one_kind_are_refused(small: DraftModel) -> None:
    for part, name in ((0, "training"), (3, "validation"), (4, "test")):
        data = planted()
        chosen = data.answer % 5 < 3 if part == 0 else data.answer % 5 == part
        data.divergent[chosen] = False
        with pytest.raises(InputError, match=f"data: 0 of the .* {name} tokens are divergent"):
            train_router(small, data, steps=1)


# Files


def test_a_router_comes_back_and_only_to_its_own_model(
    large: PreTrainedModel, small: DraftModel, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    router = TokenRouter(r2r_training._embeddings(small), 32, 24, 3, 0.37).eval()
    save_router(router, small, tmp_path, {"auc": 0.5})
    again = load_router(small, tmp_path)
    assert again.threshold == 0.37
    assert not again.training
    step = SmallStep(torch.randn(32), torch.randn(200), 7, int(small.vocabulary[7]), [1])
    assert again.score(step) == pytest.approx(router.score(step), abs=5e-3)
    assert torch.equal(again.embeddings, router.embeddings)
    assert (tmp_path / "model.safetensors").stat().st_size < 2.1 * sum(
        p.numel() for p in router.parameters()
    ) + 4000
    reordered = DraftModel(small.session, SIZE, small.vocabulary.flip(0))
    stranger = small_copy(large, (1, 2), small.vocabulary)
    for other in (reordered, DraftModel(Session(stranger), SIZE, small.vocabulary)):
        assert fingerprint(other) != fingerprint(small)
        with pytest.raises(InputError, match="trained for another small model"):
            load_router(other, tmp_path)
    with pytest.raises(InputError, match="trained for another small model"):
        load_router(small)


def test_a_later_change_of_the_embeddings_does_not_reach_the_router(small: DraftModel, tmp_path: Path) -> None:
    router = TokenRouter(r2r_training._embeddings(small), 32, 8, 1)
    save_router(router, small, tmp_path, {})
    loaded = load_router(small, tmp_path)
    table = small.session.model.get_input_embeddings().weight  # type: ignore[attr-defined]
    before, kept = loaded.embeddings.clone(), table.detach().clone()
    with torch.no_grad():
        table += 1
    try:
        assert torch.equal(loaded.embeddings, before)
        with pytest.raises(InputError, match="another small model"):
            load_router(small, tmp_path)
    finally:
        with torch.no_grad():
            table.copy_(kept)  # the large model's own memory


def test_damaged_files_are_refused(small: DraftModel, tmp_path: Path) -> None:
    router = TokenRouter(r2r_training._embeddings(small), 32, 8, 1)

    def spoil(name: str, contents: bytes | None) -> None:
        save_router(router, small, tmp_path, {})
        if contents is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(contents)
        with pytest.raises(InputError, match=r"router: .* holds no router that `tokenworks train router` wrote"):
            load_router(small, tmp_path)

    for contents in (None, b"not safetensors", (tmp_path / "nothing").name.encode()):
        spoil("model.safetensors", contents)
    facts = {"width": 8, "depth": 1, "threshold": 0.5, "small": fingerprint(small)}
    for wrong in ({"width": 9}, {"depth": 2}, {"width": "many"}):
        spoil("router.json", json.dumps(facts | wrong).encode())
    for contents in (None, b"{", b"{}", b"[]"):
        spoil("router.json", contents)


def test_make_router_leaves_a_router_and_nothing_else(
    large: PreTrainedModel,
    small: DraftModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(r2r_data, "ROWS", 5)

    def quickly(*args: object, progress: object) -> RoutingData:
        return build_routing_data(*args, 60, lambda _, ours, __: len(ours) % 2, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(r2r_training, "build_routing_data", quickly)
    found = make_router(large, small, tokenizer, tmp_path, rows=5, steps=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "router.json"]
    assert json.loads((tmp_path / "router.json").read_text())["held_out"] == found
    assert load_router(small, tmp_path).threshold > 0


@pytest.mark.model
def test_the_router_that_is_kept_is_for_smollm2s_draft_model() -> None:
    from tokenworks.core.models import load
    from tokenworks.core.text import encode_prompt, stop_ids
    from tokenworks.decode.distil import load_draft

    loaded = load("smollm2-135m")
    session = Session(loaded.model)
    draft = load_draft(loaded.model, session.vocab_size)
    decoder = RoutedDecoder(draft, session, load_router(draft), threshold=0.5)
    ids = encode_prompt(loaded.tokenizer, "Why is the sky blue?")
    found = decoder.generate(ids, 24, stop_ids(loaded.model, loaded.tokenizer))
    assert 0 < decoder.router.threshold < 0.5
    assert 0 < found.large_share < 1
    assert all(0 <= score <= 1 and not math.isnan(score) for score in found.scores)
    assert found.activated_parameters < found.weights.large
