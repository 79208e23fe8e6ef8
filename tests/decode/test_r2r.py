"""R2R: who writes is the router's choice and nothing else; both caches hold the text that was written."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.conftest import tiny_model
from tokenworks.core.corpus import train_bpe
from tokenworks.core.errors import InputError, NumericalError
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Reader, Session
from tokenworks.decode.distil import small_copy
from tokenworks.decode.draft_model import DraftModel
from tokenworks.decode.r2r import RoutedDecoder, RoutedGeneration, Weights, weights
from tokenworks.decode.r2r_routers import (
    AleatoricRouter,
    EntropyRouter,
    RandomRouter,
    Router,
    SmallStep,
    TokenRouter,
)
from tokenworks.decode.r2r_sentences import SENTENCE, OracleRouter, PathOracle, same_words, sentence
from tokenworks.decode.speculative import SpeculativeDecoder
from tokenworks.testing import ToyTarget

PROMPT, SIZE = [3, 1, 4, 1, 5], 300
SMALL, LARGE = 2.0, -1.0
"""Thresholds above and below every score of a router whose scores are in [0, 1]."""


@pytest.fixture(scope="module")
def large() -> PreTrainedModel:
    return tiny_model("llama", seed=5, vocab_size=SIZE)


@pytest.fixture(scope="module")
def other() -> PreTrainedModel:
    return tiny_model("qwen3", seed=8, vocab_size=SIZE)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(["hello world, this is a tokenizer. so it is."] * 9, 275)


def small_of(model: PreTrainedModel) -> DraftModel:
    return DraftModel(Session(model), SIZE)


def learned(small: DraftModel, seed: int = 0) -> TokenRouter:
    torch.manual_seed(seed)
    table = small.session.model.get_input_embeddings().weight[small.vocabulary]  # type: ignore[attr-defined]
    return TokenRouter(table, 32, width=16, depth=1).eval()


def alone(model: PreTrainedModel, count: int = 24) -> list[int]:
    return SpeculativeDecoder(Session(model)).generate(PROMPT, count).token_ids


class Scripted:
    """Routes the places that a pattern says, counted from the end of the prompt."""

    threshold = 0.5

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def score(self, step: SmallStep) -> float:
        return float(self.pattern[len(step.context) - len(PROMPT)] == "L")


class Spy(Session):
    """Keeps what every pass was made of: the text before it, and the logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.seen: list[tuple[list[int], Tensor]] = []

    def prefill(self, tokens: list[int] | Tensor, reader: Reader | None = None) -> Tensor:  # type: ignore[override]
        logits = super().prefill(tokens, reader)
        self.seen.append((list(self.tokens), logits))
        return logits


# Guarantee 1


def test_above_every_score_the_small_model_writes_and_below_the_large(
    large: PreTrainedModel, other: PreTrainedModel
) -> None:
    small = small_of(other)
    for router in (learned(small), EntropyRouter(), RandomRouter(0.5)):
        by_small = RoutedDecoder(small, Session(large), router, 1e9).generate(PROMPT, 24)
        by_large = RoutedDecoder(small, Session(large), router, LARGE).generate(PROMPT, 24)
        assert (by_small.token_ids, by_small.large_passes) == (alone(other), 0)
        assert (by_large.token_ids, by_large.large_passes) == (alone(large), 24)
        assert (by_small.large_tokens_read, by_large.large_tokens_read) == (0, len(PROMPT) + 23)
    assert RoutedDecoder(small, Session(large), learned(small), 0.0).generate(PROMPT, 24).token_ids == alone(large)
    assert RoutedDecoder(small, Session(large), learned(small), 1.01).generate(PROMPT, 24).large_share == 0
    assert alone(large) != alone(other)


def test_a_small_vocabulary_is_written_in_the_large_models_ids(large: PreTrainedModel) -> None:
    """The draft models of this library know a part of the ids only, in an order of their own."""
    vocabulary = torch.arange(40, 168)
    model = small_copy(large, (0, 2), vocabulary)
    small = DraftModel(Session(model), SIZE, vocabulary)
    found = RoutedDecoder(small, Session(large), learned(small), SMALL).generate(PROMPT, 12)
    text = list(PROMPT)
    for token in found.token_ids:
        with torch.inference_mode():
            assert token == int(vocabulary[model(torch.tensor([text])).logits[0, -1].argmax()])
        text.append(token)


# Guarantee 2


def test_one_model_on_both_sides_writes_its_text_whatever_the_router_says(large: PreTrainedModel) -> None:
    small = small_of(large)
    routers: list[Router] = [RandomRouter(rate, seed) for rate in (0.2, 0.7) for seed in (0, 1)]
    for router in [*routers, learned(small), EntropyRouter(0.1)]:
        found = RoutedDecoder(small, Session(large), router).generate(PROMPT, 24)
        assert found.token_ids == alone(large) == found.proposals
    oracle = RoutedDecoder(small, Session(large), OracleRouter(Session(large))).generate(PROMPT, 24)
    assert oracle.large_passes == 0


# Guarantee 3


def test_oracles_write_the_large_models_text_or_the_small_ones(
    large: PreTrainedModel, other: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    small, asked = small_of(other), Session(large)

    def write(router: Router) -> RoutedGeneration:
        return RoutedDecoder(small, Session(large), router).generate(PROMPT, 12)

    assert write(OracleRouter(asked)).token_ids == alone(large, 12)
    assert write(PathOracle(asked, tokenizer, lambda *_: 1)).token_ids == alone(large, 12)
    assert write(PathOracle(asked, tokenizer, lambda *_: None)).token_ids == alone(large, 12), (
        "in doubt, the large model"
    )
    assert write(PathOracle(asked, tokenizer, lambda *_: 0)).token_ids == alone(other, 12)


def test_the_path_oracle_compares_both_sentences_as_the_large_model_writes_them(
    large: PreTrainedModel, other: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    asked: list[tuple[str, str, str]] = []

    def verifier(context: str, ours: str, theirs: str) -> int:
        asked.append((context, ours, theirs))
        return len(asked) % 2

    found = RoutedDecoder(
        small_of(other), Session(large), PathOracle(Session(large), tokenizer, verifier)
    ).generate(PROMPT, 8)
    expected, text = [], list(PROMPT)
    for token, proposed in zip(found.token_ids, found.proposals, strict=True):
        branches = []
        for first in (proposed, SpeculativeDecoder(Session(large)).generate(text, 1).token_ids[0]):
            rest = SpeculativeDecoder(Session(large)).generate([*text, first], SENTENCE).token_ids
            branches.append((first, sentence(tokenizer, [first, *rest])))
        if branches[0][0] != branches[1][0]:
            expected.append((tokenizer.decode(text), branches[0][1], branches[1][1]))
        text.append(token)
    assert asked == expected
    assert len(asked) > 4
    assert found.large_passes == (len(asked) + 1) // 2


def test_the_path_oracle_stops_with_the_context(
    large: PreTrainedModel, other: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    oracle = PathOracle(Session(large, 20), tokenizer, lambda *_: 1)
    found = RoutedDecoder(small_of(other), Session(large, 20), oracle).generate(PROMPT, 50)
    assert found.finish_reason == "context"
    assert found.token_ids == alone(large)[: 20 - len(PROMPT) + 1]


# Guarantees 4 and 5

PATTERNS = ["LSLSLSLSLSLS", "SSSSSSSSSSSL", "LSSSSLLLSSSL", "SLSSLSSSLSSS", "LLLLLLLLLLLS", "SSSSSSSSSSSS"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_both_caches_hold_the_text_for_any_gaps(
    pattern: str, large: PreTrainedModel, other: PreTrainedModel
) -> None:
    of_large, of_small = Spy(large), Spy(other)
    decoder = RoutedDecoder(DraftModel(of_small, SIZE), of_large, Scripted(pattern))
    found = decoder.generate(PROMPT, 12)
    whole = PROMPT + found.token_ids
    assert "".join("L" if routed else "S" for routed in found.routed) == pattern
    places = {"L": [n for n, who in enumerate(pattern) if who == "L"], "S": list(range(12))}
    for model, spy, who in ((large, of_large, "L"), (other, of_small, "S")):
        assert [tokens for tokens, _ in spy.seen] == [whole[: len(PROMPT) + n] for n in places[who]]
        for tokens, logits in spy.seen:
            with torch.inference_mode():
                full = model(torch.tensor([tokens])).logits[0, -1]
            torch.testing.assert_close(logits, full, atol=1e-4, rtol=1e-4)
    assert found.large_passes == len(of_large.seen) == pattern.count("L")
    assert found.large_tokens_read == of_large.length
    own = [int(logits.argmax()) for _, logits in of_small.seen]
    assert own == found.proposals
    assert any(p != t for p, t in zip(own, found.token_ids, strict=True)) or "L" not in pattern


def test_the_state_that_a_router_sees_is_the_one_that_made_the_logits(
    large: PreTrainedModel, other: PreTrainedModel
) -> None:
    steps: list[SmallStep] = []

    class Looks(Scripted):
        def score(self, step: SmallStep) -> float:
            steps.append(SmallStep(step.hidden, step.logits, step.index, step.token, list(step.context)))
            return super().score(step)

    RoutedDecoder(small_of(other), Session(large), Looks("SLLSSLSL")).generate(PROMPT, 8)
    for step in steps:
        with torch.inference_mode():
            out = other(torch.tensor([step.context]), output_hidden_states=True)
        torch.testing.assert_close(step.hidden, out.hidden_states[-1][0, -1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(step.logits, out.logits[0, -1], atol=1e-4, rtol=1e-4)


def test_activated_parameters_are_those_that_run(large: PreTrainedModel, other: PreTrainedModel) -> None:
    small = small_of(other)
    router = learned(small)
    found = RoutedDecoder(small, Session(large), router, sum(_scores(small, large)) / 24).generate(PROMPT, 24)
    table = SIZE * 32  # both models' embeddings, which are only looked up; their heads are parameters of their own
    n_small, n_large = (sum(p.numel() for p in model.parameters()) - table for model in (other, large))
    n_router = sum(p.numel() for p in router.parameters())
    assert found.weights == Weights(n_small, n_large, n_router)
    assert 0 < found.large_share < 1
    assert found.activated_parameters == pytest.approx(n_small + n_router + found.large_share * n_large)
    tied = tiny_model("llama", vocab_size=SIZE, tie_word_embeddings=True)
    assert weights(Session(tied)) == sum(p.numel() for p in tied.parameters()), "a tied table is the head as well"
    assert weights(EntropyRouter()) == 0
    assert math.isnan(weights(ToyTarget(3)))


def _scores(small: DraftModel, large: PreTrainedModel) -> list[float]:
    return RoutedDecoder(small, Session(large), learned(small), SMALL).generate(PROMPT, 24).scores


# Guarantees 6 and 9, and the routers


def test_fewer_tokens_are_routed_the_higher_the_threshold(large: PreTrainedModel, other: PreTrainedModel) -> None:
    scores = _scores(small_of(other), large)
    shares = [sum(score >= threshold for score in scores) for threshold in (0.0, 0.2, 0.4, 0.6, 0.8, 1.01)]
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) > 2


def test_the_score_at_the_threshold_is_routed(large: PreTrainedModel, other: PreTrainedModel) -> None:
    found = RoutedDecoder(small_of(other), Session(large), Scripted("LSLS"), 1.0).generate(PROMPT, 4)
    assert found.routed == [True, False, True, False]


def step_of(logits: Tensor, context: list[int] | None = None) -> SmallStep:
    return SmallStep(torch.zeros(4), logits, int(logits.argmax()), int(logits.argmax()), context or [1, 2])


def test_entropy_is_in_nats() -> None:
    assert EntropyRouter().score(step_of(torch.zeros(50))) == pytest.approx(math.log(50), rel=1e-5)
    assert EntropyRouter().score(step_of(torch.tensor([0.0, -torch.inf, 0.0]))) == pytest.approx(math.log(2))
    assert EntropyRouter().score(step_of(torch.tensor([100.0, 0.0, 0.0]))) >= 0


def test_log_u_in_closed_form() -> None:
    aleatoric, epistemic = AleatoricRouter.uncertainty(torch.ones(10))
    psi_2, psi_11 = -0.57721566490153 + 1, -0.57721566490153 + sum(1 / n for n in range(1, 11))
    assert aleatoric == pytest.approx(psi_11 - psi_2, rel=1e-6)
    assert epistemic == 0.5
    sure, unsure = torch.tensor([20.0] + [0.1] * 30), torch.tensor([20.0] * 10 + [0.1] * 21)
    router = AleatoricRouter()
    assert router.score(step_of(sure)) < router.score(step_of(unsure))
    assert router.score(step_of(unsure)) == AleatoricRouter.uncertainty(torch.full((10,), 20.0))[0]
    assert math.isfinite(router.score(step_of(torch.tensor([1.0, -5.0, -9.0])))), "fewer logits, and negative ones"


def test_random_routing_keeps_its_rate_and_repeats() -> None:
    contexts = [[1, 2, n, n // 7] for n in range(3000)]
    for rate in (0.0, 0.3, 1.0):
        router = RandomRouter(rate)
        routed = [router.score(step_of(torch.zeros(3), c)) >= router.threshold for c in contexts]
        # Five standard deviations: fails one time in two million.
        assert abs(sum(routed) / 3000 - rate) <= 5 * math.sqrt(rate * (1 - rate) / 3000)
    once, again, else_ = (
        [RandomRouter(0.3, seed).score(step_of(torch.zeros(3), c)) for c in contexts[:20]] for seed in (0, 0, 1)
    )
    assert once == again != else_


def test_same_words() -> None:
    assert same_words("", "The cat sat on the mat.", "The cat sat on a mat.") == 0
    assert same_words("", " The answer is 12.", " Rivers flow to the sea.") == 1
    assert same_words("", "", "") == 0
    assert same_words("", "Yes.", "yes.") == 0


# Guarantee 10, and the loop


def test_runs_after_one_another_do_not_meet(large: PreTrainedModel, other: PreTrainedModel) -> None:
    prompts = [PROMPT, [7, 7, 2], [*PROMPT, 9], [250]]
    small = small_of(other)
    for router in (RandomRouter(0.4), learned(small), OracleRouter(Session(large))):
        decoder = RoutedDecoder(small, Session(large), router)
        together = [decoder.generate(prompt, 12) for prompt in prompts]
        for prompt, found in zip(prompts, together, strict=True):
            single = RoutedDecoder(small_of(other), Session(large), router).generate(prompt, 12)
            assert (single.token_ids, single.routed) == (found.token_ids, found.routed)


def test_an_end_is_an_end_whoever_writes_it_and_the_small_models_is_routed(
    large: PreTrainedModel, other: PreTrainedModel
) -> None:
    by_small, by_large = alone(other), alone(large)
    end = by_small[0]
    assert by_large[0] != end
    proposed = RoutedDecoder(small_of(other), Session(large), Scripted("L" + "S" * 9)).generate(PROMPT, 4, [end])
    assert (proposed.proposals[0], proposed.token_ids[0]) == (end, by_large[0]), "the small model's end was routed"
    assert len(proposed.token_ids) > 1
    kept = RoutedDecoder(small_of(other), Session(large), Scripted("SSSS")).generate(PROMPT, 4, [end])
    assert (kept.token_ids, kept.finish_reason) == ([end], "stop")
    routed = RoutedDecoder(small_of(other), Session(large), Scripted("LLLL")).generate(PROMPT, 4, [by_large[0]])
    assert (routed.token_ids, routed.finish_reason) == (by_large[:1], "stop")


def test_lengths_contexts_and_streaming(large: PreTrainedModel, other: PreTrainedModel) -> None:
    decoder = RoutedDecoder(small_of(other), Session(large), RandomRouter(0.5))
    streamed: list[int] = []
    whole = decoder.generate(PROMPT, 20, on_tokens=streamed.extend)
    assert streamed == whole.token_ids
    assert whole.finish_reason == "length"
    for length in (1, 5):
        assert decoder.generate(PROMPT, length).token_ids == whole.token_ids[:length]
    short = RoutedDecoder(small_of(other), Session(large, 12), RandomRouter(0.5)).generate(PROMPT, 20)
    assert (short.token_ids, short.finish_reason) == (whole.token_ids[:8], "context")


def test_a_callback_that_raises_leaves_the_decoder_usable(large: PreTrainedModel, other: PreTrainedModel) -> None:
    def interrupt(_: list[int]) -> None:
        raise KeyboardInterrupt

    decoder = RoutedDecoder(small_of(other), Session(large), RandomRouter(0.5))
    whole = decoder.generate(PROMPT, 8).token_ids
    with pytest.raises(KeyboardInterrupt):
        decoder.generate([4, 4], 8, on_tokens=interrupt)
    assert decoder.generate(PROMPT, 8).token_ids == whole


def test_sampling_repeats_and_follows_both_models(large: PreTrainedModel, other: PreTrainedModel) -> None:
    decoder = RoutedDecoder(small_of(other), Session(large), RandomRouter(0.5), sampling=Sampling(1.0, top_k=5))
    first, second, third = (decoder.generate(PROMPT, 16, seed=seed).token_ids for seed in (7, 7, 8))
    assert first == second != third
    found = decoder.generate(PROMPT, 16, seed=9)
    text = list(PROMPT)
    for token, routed in zip(found.token_ids, found.routed, strict=True):
        with torch.inference_mode():
            logits = (large if routed else other)(torch.tensor([text])).logits[0, -1]
        assert token in logits.topk(5).indices
        text.append(token)


def test_the_trace_shows_who_wrote_what(
    large: PreTrainedModel, other: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = RoutedDecoder(small_of(other), Session(large), Scripted("LSLLSSSS")).generate(PROMPT, 8)
    trace = found.trace(tokenizer)
    assert trace.channels["writer"].values == [{"L": "large", "S": "small"}[who] for who in "LSLLSSSS"]
    wanted = trace.channels["small wanted"].values
    changed = [p != t for p, t in zip(found.proposals, found.token_ids, strict=True)]
    assert [w is not None for w in wanted] == changed
    assert all(routed for routed, change in zip(found.routed, changed, strict=True) if change)
    assert trace.meta["large_share"] == 3 / 8
    assert all(low <= high for low, high in pairwise([0.0, *sorted(trace.channels["entropy"].values)]))


def test_clear_errors(large: PreTrainedModel, other: PreTrainedModel) -> None:
    small, engine = small_of(other), Session(large)
    with pytest.raises(InputError, match=r"small: .*share a tokenizer.*train draft"):
        RoutedDecoder(DraftModel(Session(tiny_model("llama")), 97), engine, RandomRouter(0.5))
    with pytest.raises(InputError, match="reads ids below 97"):
        RoutedDecoder(DraftModel(Session(tiny_model("llama")), SIZE), engine, RandomRouter(0.5))
    with pytest.raises(InputError, match="threshold: NaN"):
        RoutedDecoder(small, engine, RandomRouter(0.5), math.nan)
    with pytest.raises(InputError, match="engine does not show"):
        RoutedDecoder(DraftModel(ToyTarget(3), 3), ToyTarget(3), RandomRouter(0.5))
    decoder = RoutedDecoder(small, engine, RandomRouter(0.5))
    for prompt, words in (
        ([], "prompt: empty"),
        ([[1, 2], [3, 4]], "batch of 2"),
        ([1] * 129, "prompt: 129 tokens"),
        ([1, SIZE], f"id {SIZE} is outside"),
    ):
        with pytest.raises(InputError, match=words):
            decoder.generate(prompt)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_new_tokens"):
        decoder.generate(PROMPT, 0)
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="rate"):
            RandomRouter(rate)
    with pytest.raises(InputError, match="k: 1"):
        AleatoricRouter(k=1)
    with pytest.raises(InputError, match="width: 0"):
        TokenRouter(torch.zeros(5, 4), 4, width=0)


def test_nan_of_either_model_is_reported(large: PreTrainedModel, other: PreTrainedModel) -> None:
    broken = tiny_model("llama", vocab_size=SIZE)
    with torch.no_grad():
        broken.lm_head.weight[5] = math.nan
    for one, two in ((broken, large), (other, broken)):
        with pytest.raises(NumericalError, match="NaN"):
            RoutedDecoder(small_of(one), Session(two), RandomRouter(1.0)).generate(PROMPT, 4)
