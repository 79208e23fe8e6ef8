"""Every drafter with every verifier: exact where it is allowed, refused with the reason where it is not."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import tiny_model
from tokenworks.core.data import prompts
from tokenworks.core.errors import InputError
from tokenworks.core.measure import goodness_of_fit
from tokenworks.core.models import load
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Session
from tokenworks.core.text import encode_prompt, stop_ids
from tokenworks.decode.contract import Draft, Drafter, TokenMatching, Verdict, Verifier
from tokenworks.decode.distil import load_draft
from tokenworks.decode.draft_model import DraftModel
from tokenworks.decode.dyspec import DynamicTree
from tokenworks.decode.grid import lossless_pairs
from tokenworks.decode.registry import AIDED, DRAFTERS, METHODS, VERIFIER_OF, VERIFIERS, decoder
from tokenworks.decode.rsd import ConstantBranching, RecursiveRejection, StochasticBeam
from tokenworks.decode.spectr import IndependentDrafts, KSequential
from tokenworks.decode.speculative import SpeculativeDecoder
from tokenworks.decode.speculative_sampling import DraftChain
from tokenworks.testing import ToyTarget, check_drafter, check_verifier

SMALL = {
    "draft-chain": lambda model: DraftChain(model, 2),
    "independent-drafts": lambda model: IndependentDrafts(model, 3, 2),
    "rsd-c": lambda model: ConstantBranching(model, (2, 2)),
    "rsd-s": lambda model: StochasticBeam(model, 2, 2),
    "dyspec": lambda model: DynamicTree(model, 4, 2),
    "dyspec-threshold": lambda model: DynamicTree(model, 5, 2, 0.15),
    "dyspec-best": lambda model: DynamicTree(model, 4, 2, children="best"),
}
"""The drafters with a draft model, at sizes that a toy vocabulary does not exhaust."""

LAWS = {name: SMALL[name](DraftModel(ToyTarget(3), 3)).law for name in SMALL}
PAIRS = [(d, v) for d in SMALL for v in VERIFIERS if LAWS[d] in VERIFIERS[v].laws]
SAMPLINGS = [Sampling(1.0), Sampling(0.5), Sampling(1.0, top_p=0.8)]


def drawn_strings(
    drafter: Drafter, verifier: Verifier, sampling: Sampling, draws: int
) -> Counter[tuple[int, ...]]:
    """How often whole generations from the toy target begin with which three tokens after token 0."""
    target = ToyTarget(3)
    decode = SpeculativeDecoder(target, drafter, verifier, sampling)
    torch.manual_seed(0)
    made = (decode.generate([0], 4).token_ids for _ in range(draws))
    return Counter(tuple(ids[:3]) for ids in made)


def test_every_drafter_with_a_draft_model_is_here() -> None:
    assert set(SMALL) == set(AIDED)


@pytest.mark.parametrize(("draft", "verify"), PAIRS)
def test_every_pair_follows_the_target(draft: str, verify: str) -> None:
    for sampling in SAMPLINGS:
        drafter = SMALL[draft](DraftModel(ToyTarget(3, 5), 3))
        counts = drawn_strings(drafter, VERIFIERS[verify], sampling, 700)
        exact = ToyTarget(3).string_probabilities(0, 3, sampling)
        test = goodness_of_fit([counts[s] for s in exact], list(exact.values()), effect=0.15)
        assert test.passed, f"{sampling}: {test}"
        assert test.power > 0.95


@pytest.mark.parametrize("draft", SMALL)
def test_a_broken_verifier_is_caught_by_the_same_test(draft: str) -> None:
    """It takes the first child as it comes, one time in three."""

    class Broken(TokenMatching):
        def verify(
            self, draft: Draft, logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None
        ) -> Verdict:
            if draft.drawn(0) and float(torch.rand((), generator=generator)) < 0.34:
                child = draft.drawn(0)[0]
                return Verdict([0, child], sampling.draw(logits[child], generator), [1.0])
            return super().verify(draft, logits, sampling, generator)

    counts = drawn_strings(SMALL[draft](DraftModel(ToyTarget(3, 5), 3)), Broken(), Sampling(1.0), 700)
    exact = ToyTarget(3).string_probabilities(0, 3, Sampling(1.0))
    assert not goodness_of_fit([counts[s] for s in exact], list(exact.values()), effect=0.15).passed


@pytest.mark.parametrize("verify", VERIFIERS)
@pytest.mark.parametrize("sampling", [*SAMPLINGS, Sampling()])
def test_every_verifier_keeps_the_contract(verify: str, sampling: Sampling) -> None:
    assert set(check_verifier(VERIFIERS[verify], sampling, draws=800)) == set(VERIFIERS[verify].laws)


@pytest.mark.parametrize("draft", SMALL)
def test_greedy_text_is_the_targets_own(draft: str, tiny_llama: PreTrainedModel) -> None:
    session = Session(tiny_llama)
    helper = DraftModel(Session(tiny_model("llama", seed=1, num_hidden_layers=1)), session.vocab_size)
    check_drafter(SMALL[draft](helper), session)
    # A draft that is the target itself is accepted whole.
    same = DraftModel(Session(tiny_llama), session.vocab_size, temperature=0.01)
    decode = SpeculativeDecoder(session, SMALL[draft](same), VERIFIERS[VERIFIER_OF[LAWS[draft]]])
    assert set(decode.generate([3, 1, 4], 19).accepted) == {3}


def test_the_default_verifiers_accept_more_than_token_matching() -> None:
    for draft, verify in (("independent-drafts", "k-seq"), ("rsd-s", "recursive-rejection")):
        means = []
        for name in (verify, "token-matching"):
            drafter = SMALL[draft](DraftModel(ToyTarget(6, 5), 6))
            decode = SpeculativeDecoder(ToyTarget(6), drafter, VERIFIERS[name], Sampling(1.0))
            made = [step for seed in range(150) for step in decode.generate([0], 20, seed=seed).accepted]
            means.append(sum(made) / len(made))
        assert means[0] > means[1]


@pytest.mark.parametrize(("draft", "verify"), [(d, v) for d in SMALL for v in VERIFIERS if (d, v) not in PAIRS])
def test_pairs_that_are_not_lossless_are_refused(draft: str, verify: str) -> None:
    drafter = SMALL[draft](DraftModel(ToyTarget(3), 3))
    with pytest.raises(InputError, match=f"{verify} is not exact for {draft}.*whose tree holds .*it needs"):
        SpeculativeDecoder(ToyTarget(3), drafter, VERIFIERS[verify])


def test_one_seed_one_text() -> None:
    for draft in SMALL:
        decode = SpeculativeDecoder(
            ToyTarget(5),
            SMALL[draft](DraftModel(ToyTarget(5, 5), 5)),
            VERIFIERS[VERIFIER_OF[LAWS[draft]]],
            Sampling(1.0),
        )
        texts = [decode.generate([0], 30, seed=seed).token_ids for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]


def test_names_are_checked_before_anything_is_loaded(tiny_llama: PreTrainedModel) -> None:
    session = Session(tiny_llama)
    with pytest.raises(InputError, match="method: no decoder 'magic'; there are autoregressive"):
        decoder(session, "magic")
    with pytest.raises(InputError, match="draft: no drafter 'magic'; there are"):
        decoder(session, draft="magic")
    with pytest.raises(InputError, match="verify: no verifier 'magic'; there are token-matching"):
        decoder(session, draft="autoregressive", verify="magic")
    with pytest.raises(InputError, match=r"draft-model: .*another target.*tokenworks train draft"):
        decoder(session, "spectr")
    assert set(METHODS.values()) <= set(DRAFTERS)


def test_a_method_is_its_pair(tiny_llama: PreTrainedModel) -> None:
    session = Session(tiny_llama)
    helper = DraftModel(Session(tiny_llama), session.vocab_size)
    expected = {"spectr": KSequential, "rsd": RecursiveRejection, "dyspec": RecursiveRejection}
    for method, verifier in expected.items():
        decode = decoder(session, method, draft_model=helper)
        assert type(decode.verifier) is verifier
        assert decode.drafter.name == METHODS[method]
    mixed = decoder(session, draft="rsd-c", verify="token-matching", draft_model=helper)
    assert (mixed.drafter.name, mixed.verifier.name) == ("rsd-c", "token-matching")


@pytest.mark.model
def test_every_pair_writes_the_greedy_text_of_smollm2() -> None:
    loaded = load("smollm2-135m")
    session = Session(loaded.model)
    pairs = lossless_pairs(session, load_draft(loaded.model, session.vocab_size), Sampling())
    assert {draft for draft, _ in pairs} == set(DRAFTERS)
    for prompt in prompts(split="test", limit=2):
        ids = encode_prompt(loaded.tokenizer, prompt.text)
        stops = stop_ids(loaded.model, loaded.tokenizer)
        own = loaded.model.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False, eos_token_id=stops)
        for pair, decode in pairs.items():
            assert decode.generate(ids, 10, stops).token_ids == own[0, len(ids) :].tolist(), pair
