"""cDPO: contrastive estimation against brute force and Bayes, the loss and its gradients, both reductions."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from tests.conftest import tiny_model
from tokenworks.align.cdpo import CDPO
from tokenworks.align.contract import Pairs
from tokenworks.align.dpo import DPO
from tokenworks.align.explain import explain
from tokenworks.align.reading import collate, encode_pair, read_pairs
from tokenworks.align.scores import contrast, contrastive_scores
from tokenworks.core.corpus import train_bpe
from tokenworks.core.errors import InputError

LENGTHS = (5, 3, 4, 6)
"""Of two chosen and two rejected responses."""


def pairs(score: float | None = None, padding: int = 0, at_reference: bool = False) -> Pairs:
    """Two pairs behind prompts of two tokens; `score` for all tokens, random by default."""
    generator = torch.Generator().manual_seed(0)
    width = max(LENGTHS) + 2 + padding
    mask = torch.zeros(4, width, dtype=torch.bool)
    log_p, log_ref, scores = torch.zeros(4, width), torch.zeros(4, width), torch.zeros(4, width)
    for row, length in enumerate(LENGTHS):
        mask[row, 1 : 1 + length] = True
        draws = torch.randn(2, length, generator=generator)
        log_ref[row, mask[row]] = draws[0] - 3
        log_p[row, mask[row]] = draws[0] - 3 if at_reference else draws[1] - 3
        own = torch.rand(length, generator=generator) if score is None else torch.full((length,), score)
        scores[row, mask[row]] = own
    return Pairs(log_p.requires_grad_(True), log_ref, mask, scores=scores)


def ends(found: Pairs) -> Tensor:
    """Where each response has its last token: bool [4, T]."""
    last = torch.zeros_like(found.mask)
    for row, length in enumerate(LENGTHS):
        last[row, length] = True
    return last


# --- contrastive estimation -----------------------------------------------------------------------------------


def rows(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, n = (torch.log_softmax(2 * torch.randn(7, 13, generator=generator, dtype=torch.float64), -1) for _ in "pn")
    return p, n


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 3.0])
def test_the_contrast_is_what_it_says(gamma: float) -> None:
    p, n = rows(0)
    found = contrast(p, n, gamma)
    weights = p.exp() ** (1 + gamma) * n.exp() ** (-gamma)
    torch.testing.assert_close(found.exp(), weights / weights.sum(-1, keepdim=True), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(7, dtype=torch.float64))
    z = weights.sum(-1, keepdim=True).log()
    torch.testing.assert_close(found, (1 + gamma) * p - gamma * n - z, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(contrast(p + 3.5, n - 20, gamma), found, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(contrast(p, p, gamma), p, atol=1e-9, rtol=1e-9)
    if gamma == 0:
        torch.testing.assert_close(found, p, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("begin", [[1, 2, 3], [0, 1, 2, 3]], ids=["no beginning token", "a beginning token"])
def test_scores_stand_at_their_tokens(begin: list[int], tiny_llama: PreTrainedModel) -> None:
    """The score of response token j is of the row at place prompt + j - 1, however long the prompt is."""
    other, response = tiny_model("llama", seed=1), [4, 5, 6, 7]
    found = contrastive_scores(tiny_llama, other, gamma=1.0)(begin, response)
    ids = torch.tensor([begin + response])
    log_p, log_n = (m(ids).logits[0].log_softmax(-1) for m in (tiny_llama, other))
    for j, token in enumerate(response):
        place = len(begin) + j - 1
        weights = log_p[place].exp() ** 2 / log_n[place].exp()
        assert found[j] == pytest.approx(float(weights[token] / weights.sum()), abs=1e-6)
    same = contrastive_scores(tiny_llama, tiny_llama, gamma=2.0)(begin, response)
    assert same == pytest.approx(
        [float(log_p[len(begin) + j - 1, t].exp()) for j, t in enumerate(response)], abs=1e-6
    )


def test_with_true_models_the_ratio_is_the_gain_in_posterior_odds() -> None:
    """A tree of texts of which some are right; p and n are the exact distributions given right and given wrong.
    Then log p / n of a token is by how much it moves the log odds of right against wrong, and the token that costs
    most is the critical one."""
    generator, depth, vocab = torch.Generator().manual_seed(3), 4, 3
    base = {
        text: torch.softmax(torch.randn(vocab, generator=generator, dtype=torch.float64), 0)
        for length in range(depth) for text in itertools.product(range(vocab), repeat=length)
    }  # fmt: skip
    whole = list(itertools.product(range(vocab), repeat=depth))
    right = {text: bool(torch.rand((), generator=generator) < 0.6) and text[:2] != (1, 2) for text in whole}

    def chance(text: tuple[int, ...], want: bool) -> float:
        """Of ending up right or wrong, from behind a text."""
        if len(text) == depth:
            return float(right[text] == want)
        return sum(float(base[text][token]) * chance((*text, token), want) for token in range(vocab))

    def given(text: tuple[int, ...], token: int, want: bool) -> float:
        """The base model's next token, given how it ends."""
        return float(base[text][token]) * chance((*text, token), want) / chance(text, want)

    for text in ((), (0,), (1,), (2, 0), (0, 1, 2)):
        if min(chance(text, True), chance(text, False)) < 1e-12:
            continue
        drops, ratios = [], []
        for token in range(vocab):
            after = (*text, token)
            drops.append(chance(after, True) - chance(text, True))
            if min(chance(after, True), chance(after, False)) < 1e-12:
                ratios.append(math.inf if chance(after, True) > 0.5 else -math.inf)
                continue
            odds = [chance(state, True) / chance(state, False) for state in (text, after)]
            ratios.append(math.log(given(text, token, True) / given(text, token, False)))
            assert ratios[-1] == pytest.approx(math.log(odds[1] / odds[0]), abs=1e-9)
        assert ratios.index(min(ratios)) == drops.index(min(drops))
    # The token of no return, (1, 2): nothing behind it is right, and p never says it.
    assert given((1,), 2, True) == 0
    assert given((1,), 2, False) > 0


# --- the loss -------------------------------------------------------------------------------------------------


def test_without_scores_it_is_dpo() -> None:
    ours, theirs = pairs(0.0), pairs(0.0)
    one, other = CDPO(0.3)(ours).loss, DPO(0.3)(theirs).loss
    torch.testing.assert_close(one, other, atol=1e-7, rtol=0)
    one.sum().backward()
    other.sum().backward()
    torch.testing.assert_close(ours.log_p.grad, theirs.log_p.grad, atol=1e-7, rtol=0)


def test_the_formula() -> None:
    found = pairs()
    assert found.scores is not None
    loss = CDPO(0.3)(found).loss
    for row in range(2):
        chosen = found.log_ratio[row].sum()
        weights = torch.where(ends(found)[row + 2], 1.0, 1 - found.scores[row + 2])
        rejected = (weights * found.log_ratio[row + 2]).sum()
        torch.testing.assert_close(loss[row], -logsigmoid(0.3 * (chosen - rejected)))
    both = CDPO(0.3, only_negative=False)(found)
    weights = torch.where(ends(found)[:2], 1.0, found.scores[:2])
    torch.testing.assert_close(both.channels["weight"][:2][found.mask[:2]], weights[found.mask[:2]])
    assert not torch.allclose(both.loss, loss)


def test_a_rejected_text_that_right_chains_would_write_is_let_be() -> None:
    found = pairs(1.0)
    CDPO(0.3)(found).loss.sum().backward()
    assert found.log_p.grad is not None
    inside = found.mask & ~ends(found)
    assert not found.log_p.grad[2:][inside[2:]].any()
    assert found.log_p.grad[:2][found.mask[:2]].all()


def test_weights_only_weaken_what_dpo_does() -> None:
    found = pairs()
    weights = CDPO(0.3).weights(found)
    assert ((weights >= 0) & (weights <= 1)).all()
    assert (weights[ends(found)] == 1).all()
    assert not weights[~found.mask].any()
    loss = CDPO(0.3)(found).loss
    loss.sum().backward()
    assert found.log_p.grad is not None
    # At equal sigmoid DPO pushes every rejected token by beta (1 - sigmoid), cDPO by its weight of that.
    full = 0.3 * (1 - (-loss.detach()).exp())
    torch.testing.assert_close(
        found.log_p.grad[2:], torch.where(found.mask[2:], full[:, None] * weights[2:], 0.0), atol=1e-6, rtol=1e-5
    )
    assert (found.log_p.grad[2:] <= full[:, None] + 1e-7).all()


def test_at_the_reference() -> None:
    found = pairs(at_reference=True)
    assert found.scores is not None
    loss = CDPO(0.3)(found).loss
    torch.testing.assert_close(loss, torch.full((2,), math.log(2.0)))
    loss.sum().backward()
    weights = torch.where(ends(found), 1.0, 1 - found.scores)[2:]
    torch.testing.assert_close(found.log_p.grad[2:][found.mask[2:]], 0.15 * weights[found.mask[2:]])  # type: ignore[index]


def test_only_the_released_reduction_depends_on_padding() -> None:
    narrow, wide = pairs(), pairs(padding=5)
    for reduction, same in (("sequence", True), ("released", False)):
        one, other = (CDPO(0.3, reduction=reduction)(each).loss for each in (narrow, wide))
        assert torch.allclose(one, other, atol=1e-7) == same
    found = CDPO(0.3, reduction="released")(narrow)
    weighted = 0.3 * found.channels["weight"] * narrow.log_ratio
    each = -logsigmoid(weighted[:2] - weighted[2:])
    torch.testing.assert_close(found.loss, each.mean(1))
    outside = ~(narrow.mask[:2] | narrow.mask[2:])
    torch.testing.assert_close(each[outside], torch.full_like(each[outside], math.log(2.0)))


def test_scores_have_no_gradient() -> None:
    found = pairs()
    scores = found.scores.clone().requires_grad_(True)  # type: ignore[union-attr]
    CDPO()(replace(found, scores=scores)).loss.sum().backward()
    assert scores.grad is None


def test_with_models_and_a_trace(tiny_llama: PreTrainedModel) -> None:
    tokenizer = train_bpe(["nothing to merge"], 257, special=["<end>"])
    tokenizer.eos_token = "<end>"
    policy, reference, right, wrong = (tiny_model("llama", seed, vocab_size=257) for seed in range(4))
    scorer = contrastive_scores(right, wrong)
    traces = explain(policy, reference, tokenizer, "1+1=", "2", "33", CDPO(0.3), scorer)
    weights = traces[1].channels["weight"].values
    pair = encode_pair(tokenizer, "1+1=", "2", "33")
    scores = scorer(pair.prompt, pair.rejected)
    assert weights == pytest.approx([1 - scores[0], 1 - scores[1], 1.0], abs=1e-5)
    assert traces[0].channels["weight"].values == [1.0, 1.0]
    pair = replace(pair, chosen_scores=scorer(pair.prompt, pair.chosen), rejected_scores=scores)
    loss = CDPO(0.3)(read_pairs(policy, reference, collate([pair]), CDPO.needs)).loss
    assert float(loss.sum()) == pytest.approx(traces[0].meta["loss"], abs=1e-5)


def test_misuse(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="beta: -1"):
        CDPO(-1)
    with pytest.raises(InputError, match="reduction: no 'mean'"):
        CDPO(reduction="mean")
    for bad in (1.5, -0.1, math.nan):
        with pytest.raises(InputError, match="scores: not probabilities"):
            CDPO()(pairs(bad))
    with pytest.raises(InputError, match="the method needs `scores`"):
        CDPO()(replace(pairs(), scores=None))
    with pytest.raises(InputError, match="gamma: -1"):
        contrastive_scores(tiny_llama, tiny_llama, gamma=-1)
    with pytest.raises(InputError, match="it knows 33 tokens"):
        contrastive_scores(tiny_llama, tiny_model("llama", vocab_size=33))
    with pytest.raises(InputError, match="prompt, response: empty"):
        contrastive_scores(tiny_llama, tiny_llama)([1], [])
