"""ASSD: exact draws from the joint density, never more passes than holes, nothing seen that must not be."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from tests.decode.test_any_subset import tiny_xlnet
from tokenworks.core.errors import InputError, NumericalError
from tokenworks.core.fit import FitTest, goodness_of_fit
from tokenworks.core.sampling import Sampling
from tokenworks.decode import assd
from tokenworks.decode.any_subset import AnySubsetLM, draft_mask, lattice_order, load_any_subset, oracle_mask
from tokenworks.decode.assd import Bigrams, DraftKind, infill, joint_log_prob

TEXT = [2, 0, 3, 0, 0, 1]
"""Holes (id 0) at 1, 3 and 4."""


class Pairwise:
    """A model that adds up what each token it sees says about another place; all but free, and all dependent."""

    vocab_size, mask_token_id, max_length = 5, 0, 128

    def __init__(self) -> None:
        self._says = 1.4 * torch.randn(5, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def logits(self, tokens: Tensor, forbidden: Tensor, targets: Tensor) -> Tensor:
        rows = []
        for target in targets.tolist():
            seen = [j for j in range(len(tokens)) if not forbidden[target, j]]
            assert all(tokens[j] != 0 for j in seen), "a hole was seen"
            rows.append(sum((self._says[tokens[j], (target - j) % 7] for j in seen), torch.zeros(5).double()))
        return torch.stack(rows)


@pytest.fixture(params=["pairwise", "xlnet"])
def model(request: pytest.FixtureRequest) -> AnySubsetLM:
    return Pairwise() if request.param == "pairwise" else tiny_xlnet(5)


def fillings(model: AnySubsetLM, tokens: list[int]) -> dict[tuple[int, ...], float]:
    """The exact joint density by one pass a hole: the definition, without masks for many holes at once."""
    ids = torch.tensor(tokens)
    holes = (ids == 0).nonzero()[:, 0].tolist()
    rank, start = lattice_order(ids == 0)
    found = {}
    for choice in itertools.product(range(1, model.vocab_size), repeat=len(holes)):
        filled, log_p = ids.clone(), 0.0
        for number, (hole, token) in enumerate(zip(holes, choice, strict=True)):
            logits = model.logits(filled, draft_mask(rank, start, start + number), torch.tensor([hole]))[0]
            logits[0] = -torch.inf
            log_p += float(torch.log_softmax(logits, -1)[token])
            filled[hole] = token
        found[choice] = float(torch.tensor(log_p).exp())
    return found


class Counted:
    """A model that counts its passes and keeps what it was asked."""

    def __init__(self, model: AnySubsetLM) -> None:
        self._model, self.passes = model, 0
        self.vocab_size, self.mask_token_id, self.max_length = model.vocab_size, 0, model.max_length

    def logits(self, tokens: Tensor, forbidden: Tensor, targets: Tensor) -> Tensor:
        self.passes += 1
        return self._model.logits(tokens, forbidden, targets)


class Independent:
    """A model whose conditionals ignore everything: its own drafts are always right."""

    vocab_size, mask_token_id, max_length = 7, 0, 64

    def logits(self, tokens: Tensor, forbidden: Tensor, targets: Tensor) -> Tensor:
        return torch.arange(7.0).expand(len(targets), -1).clone()


@pytest.mark.parametrize(("draft", "k"), [("self", 2), ("self", 3), ("bigram", 2), ("bigram", 5), ("none", 1)])
def test_fillings_follow_the_joint_density(draft: DraftKind, k: int) -> None:
    test = fit_of_fillings(Pairwise(), draft, k, 900)
    assert test.passed, str(test)
    assert test.power > 0.9


def test_fillings_of_a_real_network_follow_its_joint_density() -> None:
    test = fit_of_fillings(tiny_xlnet(5), "self", 3, 300)
    assert test.passed, str(test)


def fit_of_fillings(model: AnySubsetLM, draft: DraftKind, k: int, draws: int) -> FitTest:
    exact = fillings(model, TEXT)
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    torch.manual_seed(0)
    made = (infill(model, TEXT, k, draft).token_ids for _ in range(draws))
    counts = Counter((ids[1], ids[3], ids[4]) for ids in made)
    return goodness_of_fit([counts[choice] for choice in exact], list(exact.values()), effect=0.25)


def test_without_the_check_they_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same test catches drafts that are taken as they are."""

    def take(self: assd._Filling, slots: list[int], drawn: list[int], drafts: Tensor) -> None:
        for j, (slot, y) in enumerate(zip(slots, drawn, strict=True)):
            self._decide(slot, y, "draft", 1.0, drafts[j])

    monkeypatch.setattr(assd._Filling, "_check", take)
    assert not fit_of_fillings(Pairwise(), "self", 3, 900).passed


@pytest.mark.parametrize("sampling", [Sampling(0.5), Sampling(1.0, top_p=0.8)])
def test_warped_draws_follow_the_warped_conditionals(sampling: Sampling) -> None:
    model, text = Pairwise(), [2, 0, 0, 1]
    rank, start = lattice_order(torch.tensor(text) == 0)
    exact = {}
    for first, second in itertools.product(range(1, 5), repeat=2):
        p = 1.0
        for number, ids in enumerate(([2, 0, 0, 1], [2, first, 0, 1])):
            target = torch.tensor([1 + number])
            logits = model.logits(torch.tensor(ids), draft_mask(rank, start, start + number), target)[0]
            logits[0] = -torch.inf
            p *= float(sampling.distribution(logits)[(first, second)[number]])
        exact[first, second] = p
    torch.manual_seed(0)
    made = (infill(model, text, 2, sampling=sampling).token_ids for _ in range(700))
    counts = Counter((ids[1], ids[2]) for ids in made)
    possible = {choice: p for choice, p in exact.items() if p > 0}
    assert set(counts) <= set(possible)
    test = goodness_of_fit([counts[c] for c in possible], list(possible.values()), effect=0.2)
    assert test.passed, str(test)


def test_one_pass_gives_the_joint_density(model: AnySubsetLM) -> None:
    exact = fillings(model, TEXT)
    counted = Counted(model)
    for choice, p in exact.items():
        filled = [2, choice[0], 3, choice[1], choice[2], 1]
        assert joint_log_prob(counted, filled, [1, 3, 4]) == pytest.approx(float(torch.tensor(p).log()), abs=1e-4)
    assert counted.passes == len(exact)


def test_the_density_sums_to_one_for_every_set_of_holes(model: AnySubsetLM) -> None:
    for size in (1, 2, 3):
        for holes in itertools.combinations(range(4), size):
            total = 0.0
            for choice in itertools.product(range(1, 5), repeat=size):
                filled = [2, 3, 1, 4]
                for hole, token in zip(holes, choice, strict=True):
                    filled[hole] = token
                total += math.exp(joint_log_prob(model, filled, holes))
            assert total == pytest.approx(1, abs=1e-9 if isinstance(model, Pairwise) else 1e-4)


@pytest.mark.parametrize(("draft", "k"), itertools.product(("self", "bigram"), (1, 2, 3, 5, 10)))
def test_there_are_never_more_passes_than_holes(model: AnySubsetLM, draft: DraftKind, k: int) -> None:
    for seed in range(12):
        chance = torch.Generator().manual_seed(seed)
        text = torch.randint(1, 5, (16,), generator=chance)
        text[torch.randperm(16, generator=chance)[: int(torch.randint(1, 16, (1,), generator=chance))]] = 0
        holes, counted = int((text == 0).sum()), Counted(model)
        found = infill(counted, text, k, draft, seed=seed)
        assert counted.passes == found.evaluations <= holes
        assert sum(found.accepted) == len(found.decisions) == holes
        assert 0 not in found.token_ids
        assert all(found.token_ids[i] == t for i, t in enumerate(text.tolist()) if t), "what is given stays"
        if k == 1 and draft == "self":
            assert found.evaluations == holes
            assert found.token_ids == infill(model, text, draft="none", seed=seed).token_ids


def test_the_first_draft_is_as_exact_as_its_check(model: AnySubsetLM) -> None:
    chance = torch.Generator().manual_seed(0)
    text = torch.randint(1, 5, (14,), generator=chance)
    text[[1, 2, 5, 6, 7, 11]] = 0
    rank, start = lattice_order(text == 0)
    order = rank.argsort()
    for decided in range(start, 14):
        slots = order[decided : decided + 3]
        drafted = model.logits(text, draft_mask(rank, start, decided), slots)
        complete = text.clone()
        complete[order[decided:]] = 2
        checked = model.logits(complete, oracle_mask(rank, start), slots)
        assert torch.allclose(drafted[0], checked[0], atol=1e-5)
        text[slots[0]] = 2


def test_drafts_that_need_no_check_are_all_accepted() -> None:
    for holes, k in ((9, 3), (10, 3), (11, 4)):
        found = infill(Independent(), [3] + [0] * holes, k, seed=0)
        rounds = -(-holes // k)
        last = holes - (rounds - 1) * k
        assert found.evaluations == 2 * rounds - (last == 1)
        assert all(decision.acceptance in (1, None) for decision in found.decisions)


def test_acceptance_is_the_overlap_of_draft_and_oracle() -> None:
    """Of the second draft, over many fillings: the mean of sum_v min(P, Q) given the first."""
    torch.manual_seed(0)
    model = Pairwise()
    text, taken, expected = [2, 0, 0, 1], 0, 0.0
    rank, start = lattice_order(torch.tensor(text) == 0)
    alone = model.logits(torch.tensor(text), draft_mask(rank, start, start), torch.tensor([2]))[0]
    for _ in range(600):
        found = infill(model, text, 2)
        taken += found.decisions[1].source == "draft"
        known = torch.tensor([2, found.token_ids[1], 0, 1])
        exact = model.logits(known, draft_mask(rank, start, start + 1), torch.tensor([2]))[0]
        exact[0] = alone[0] = -torch.inf
        expected += float(torch.minimum(torch.softmax(alone, -1), torch.softmax(exact, -1)).sum())
    assert taken / 600 == pytest.approx(expected / 600, abs=0.06)


@pytest.mark.parametrize("draft", ["self", "bigram", "none"])
def test_greedy_is_one_token_after_another(model: AnySubsetLM, draft: DraftKind) -> None:
    for seed in range(6):
        text = torch.randint(0, 5, (15,), generator=torch.Generator().manual_seed(seed))
        text[0] = 3
        expected = text.clone()
        rank, start = lattice_order(text == 0)
        for decided, slot in enumerate((text == 0).nonzero()[:, 0].tolist(), start=start):
            logits = model.logits(expected, draft_mask(rank, start, decided), torch.tensor([slot]))[0]
            expected[slot] = 1 + int(logits[1:].argmax())
        assert infill(model, text, 4, draft, Sampling(0.0)).token_ids == expected.tolist()


def test_bigrams_are_those_of_a_recount() -> None:
    chance = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 6, (40,), generator=chance)
    visible = torch.rand(40, generator=chance) < 0.3
    counts = Bigrams(tokens, visible, 6)
    for position in (~visible).nonzero()[:, 0].tolist():
        counts.add(position, int(tokens[position]))
        visible[position] = True
        again = Bigrams(tokens, visible, 6)
        assert counts.single == again.single
        assert {k: v for k, v in counts.pairs.items() if v} == {k: v for k, v in again.pairs.items() if v}
        for left in range(6):
            assert float(counts.distribution(left).sum()) == pytest.approx(1)
    assert Bigrams(torch.tensor([1, 2, 1, 2, 1, 3]), torch.ones(6) > 0, 4).distribution(1).tolist() == [
        0, 0, pytest.approx(2 / 3), pytest.approx(1 / 3),
    ]  # fmt: skip
    assert Bigrams(torch.tensor([1, 2]), torch.ones(2) > 0, 4).distribution(2).tolist() == [0, 0.5, 0.5, 0]


def test_it_streams_seeds_and_leaves_a_trace() -> None:
    model, tokenizer = load_any_subset()
    ids = tokenizer("Return a list of the")["input_ids"] + [0] * 8 + tokenizer(" in the dictionary.")["input_ids"]
    seen: list[tuple[int, int]] = []
    found = infill(model, ids, seed=3, on_tokens=seen.extend)
    assert infill(model, ids, seed=3).token_ids == found.token_ids
    assert [found.token_ids[position] for position, _ in seen] == [token for _, token in seen]
    assert len(seen) == 8
    trace = found.trace(tokenizer)
    assert set(trace.channels["source"].values) <= {"given", "draft", "resampled", "model"}
    assert trace.channels["source"].values.count("given") == len(ids) - 8
    assert sum(value is not None for value in trace.channels["probability"].values) == 8
    holes = [position for position, _ in seen]
    assert found.log_prob == pytest.approx(joint_log_prob(model, found.token_ids, holes), abs=1e-3)


def test_clear_errors(model: AnySubsetLM) -> None:
    assert infill(model, [1, 2, 3]).token_ids == [1, 2, 3]
    for tokens, words in (
        ([[1, 0]], "one text at a time"),
        ([0, 0], "every one is a hole"),
        ([1, 9], "outside the model's vocabulary of 5"),
        ([1, -1], "outside the model's vocabulary of 5"),
        ([], "0 of them"),
        ([1] * 200, "200 of them; the model reads 1 to 128"),
    ):
        with pytest.raises(InputError, match=f"tokens: .*{words}"):
            infill(model, torch.tensor(tokens, dtype=torch.long))
    with pytest.raises(InputError, match="k: 0"):
        infill(model, TEXT, 0)
    with pytest.raises(InputError, match="draft: there is no 'other'"):
        infill(model, TEXT, draft="other")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"holes: \[7\]"):
        joint_log_prob(model, [1, 2, 3], [7])
    with pytest.raises(InputError, match="tokens: a mask is left"):
        joint_log_prob(model, [1, 0, 3, 4], [2])

    class Broken(Independent):
        def logits(self, tokens: Tensor, forbidden: Tensor, targets: Tensor) -> Tensor:
            return torch.full((len(targets), 7), torch.nan)

    with pytest.raises(NumericalError, match="NaN"):
        infill(Broken(), TEXT)
