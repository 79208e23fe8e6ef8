"""The decoding loop: the target's own text, cut exactly, streamed, seeded; and the checks that guard it."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import tiny_model
from tokenworks.core.errors import InputError, NumericalError
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Session
from tokenworks.decode import Autoregressive, Law, SpeculativeDecoder, TokenMatching, decoder
from tokenworks.decode.contract import Draft, Verdict
from tokenworks.testing import ToyDrafter, ToyTarget, check_drafter, check_verifier

PROMPT = [3, 1, 4, 1, 5]


def test_plain_decoding_equals_generate(tiny_llama: PreTrainedModel) -> None:
    own = tiny_llama.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False)[
        0, len(PROMPT) :
    ].tolist()
    generation = SpeculativeDecoder(Session(tiny_llama)).generate(PROMPT, 20)
    assert generation.token_ids == own
    assert generation.target_passes == 20
    assert generation.mean_accepted == 1
    assert generation.finish_reason == "length"


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.5), Sampling(1.0, top_p=0.8), Sampling(1.0, top_k=2)]
)
def test_token_matching_follows_the_target(sampling: Sampling) -> None:
    tests = check_verifier(TokenMatching(), sampling)
    assert set(tests) == set(Law)
    # Top-p and top-k leave so few strings that nothing can hide; the power is stated either way.
    assert all(test.power > 0.9 for test in tests.values())


class _PrefersDraft(TokenMatching):
    """Broken: accepts the first child without asking the target, one time in five."""

    name = "broken"

    def verify(self, draft: Draft, logits: torch.Tensor, sampling: Sampling, generator: object) -> Verdict:
        if draft.tree.shape.children[0] and float(torch.rand(())) < 0.2:
            return Verdict([0, 1], sampling.draw(logits[1]), [1.0])
        return super().verify(draft, logits, sampling, None)


class _LeavesTree(TokenMatching):
    name = "leaves-tree"

    def verify(self, draft: Draft, logits: torch.Tensor, sampling: Sampling, generator: object) -> Verdict:
        return Verdict([0, len(draft.tree) - 1], 0, [1.0])


def test_a_broken_verifier_is_caught() -> None:
    with pytest.raises(AssertionError, match="does not follow the target"):
        check_verifier(_PrefersDraft(), laws=[Law.FIXED])
    with pytest.raises(AssertionError, match="does not lead down"):
        check_verifier(_LeavesTree(), laws=[Law.FIXED])


def test_check_drafter_accepts_good_and_catches_bad(tiny_llama: PreTrainedModel) -> None:
    session = Session(tiny_llama)
    check_drafter(Autoregressive(), session)
    for law in Law:
        check_drafter(ToyDrafter(law, vocab_size=97), session)

    class TooDeep(ToyDrafter):
        def propose(self, context: list[int], room: int) -> Draft:
            return super().propose(context, 2)

    with pytest.raises(AssertionError, match="levels deep"):
        check_drafter(TooDeep(Law.FIXED, 97), session)

    class WrongRoot(ToyDrafter):
        def propose(self, context: list[int], room: int) -> Draft:
            return super().propose([(context[-1] + 1) % 97], room)

    with pytest.raises(AssertionError, match="node 0 must hold"):
        check_drafter(WrongRoot(Law.FIXED, 97), session)


def test_seeded_sampling_repeats_and_seeds_differ(tiny_llama: PreTrainedModel) -> None:
    decode = SpeculativeDecoder(Session(tiny_llama), sampling=Sampling(1.0))
    first, second, other = (decode.generate(PROMPT, 16, seed=seed).token_ids for seed in (7, 7, 8))
    assert first == second != other


def test_stop_tokens_and_length_cut_exactly_and_streaming_gives_every_token() -> None:
    session = Session(tiny_model("gpt2"))
    decode = SpeculativeDecoder(session, ToyDrafter(Law.FIXED, 97))
    whole = decode.generate(PROMPT, 30).token_ids
    for length in range(1, 8):
        assert decode.generate(PROMPT, length).token_ids == whole[:length]
    stop = whole[10]
    streamed: list[int] = []
    stopped = decode.generate(PROMPT, 30, [stop], on_tokens=streamed.extend)
    assert stopped.token_ids == whole[: whole.index(stop) + 1] == streamed
    assert stopped.finish_reason == "stop"
    assert [step.number for step in stopped.steps] == sorted(step.number for step in stopped.steps)
    assert len(stopped.steps) == len(stopped.token_ids)


def test_generation_ends_where_the_context_does(tiny_llama: PreTrainedModel) -> None:
    session = Session(tiny_llama, max_length=12)
    generation = SpeculativeDecoder(session, ToyDrafter(Law.FIXED, 97)).generate(PROMPT, 50)
    whole = SpeculativeDecoder(Session(tiny_llama)).generate(PROMPT, 50).token_ids
    assert generation.finish_reason == "context"
    assert generation.token_ids == whole[: 12 - len(PROMPT) + 1]


def test_a_callback_that_raises_leaves_the_session_usable(tiny_llama: PreTrainedModel) -> None:
    def interrupt(_: list[int]) -> None:
        raise KeyboardInterrupt

    decode = SpeculativeDecoder(Session(tiny_llama))
    with pytest.raises(KeyboardInterrupt):
        decode.generate(PROMPT, 8, on_tokens=interrupt)
    assert len(decode.generate(PROMPT, 8).token_ids) == 8


class _TakesOnlyIndependent(TokenMatching):
    laws = frozenset({Law.INDEPENDENT})


def test_bad_input_is_named(tiny_llama: PreTrainedModel) -> None:
    session = Session(tiny_llama)
    decode = SpeculativeDecoder(session)
    for prompt, words in (
        ([], "prompt: empty"),
        ([[1, 2], [3, 4]], "batch of 2"),
        ([1] * 129, "prompt: 129 tokens"),
        ([1, 97], "id 97 is outside"),
    ):
        with pytest.raises(InputError, match=words):
            decode.generate(prompt)
    with pytest.raises(InputError, match="max_new_tokens"):
        decode.generate(PROMPT, 0)
    with pytest.raises(InputError, match="method"):
        decoder(session, "no-such")
    with pytest.raises(InputError, match="not exact"):
        SpeculativeDecoder(session, Autoregressive(), _TakesOnlyIndependent())


def test_nan_logits_are_reported() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        SpeculativeDecoder(Session(model)).generate(PROMPT, 4)


def test_toy_target_probabilities_sum_to_one() -> None:
    exact = ToyTarget().string_probabilities(0, 3, Sampling(1.0))
    assert len(exact) == 27
    assert sum(exact.values()) == pytest.approx(1)
