"""TGDPO: weights and gradients in closed form, the optimum behind it, and what its elimination theorem covers."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, logsigmoid

from tests.align.made_up import loss_and_gradients, random_pairs, swapped, widened
from tests.conftest import tiny_model
from tokenworks.align.contract import Pairs
from tokenworks.align.dpo import DPO
from tokenworks.align.reading import EncodedPair, collate, read_pairs
from tokenworks.align.scores import guide_rewards
from tokenworks.align.tgdpo import TGDPO, guided_optimum
from tokenworks.core.errors import InputError

BETA, ALPHA = 0.3, 0.7


def signs(pairs: Pairs) -> Tensor:
    """1 on chosen tokens, -1 on rejected ones, 0 elsewhere."""
    chosen, rejected = pairs.mask.chunk(2)
    return torch.cat([chosen.double(), -rejected.double()])


def test_the_loss_is_the_papers() -> None:
    """With scores beta g the weight is 1 + alpha beta g, beta once outside and once inside."""
    pairs = random_pairs()
    g = pairs.scores
    assert g is not None
    outcome = TGDPO(BETA, ALPHA)(replace(pairs, scores=BETA * g))
    h = torch.zeros(3).double()
    for row in range(3):
        for token in range(pairs.mask.shape[1]):
            for side, sign in ((row, 1), (row + 3, -1)):
                if pairs.mask[side, token]:
                    weight = BETA * (1 + sign * ALPHA * BETA * g[side, token])
                    h[row] += sign * weight * pairs.log_ratio[side, token].detach()
    torch.testing.assert_close(outcome.loss, -logsigmoid(h), atol=1e-12, rtol=0)
    torch.testing.assert_close(outcome.rewards, BETA * pairs.log_ratio.sum(1).detach())
    for name, values in outcome.channels.items():
        assert not values.requires_grad
        assert (values[~pairs.mask] == 0).all()
        assert outcome.descriptions[name]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 4.0])
def test_at_the_reference_the_gradient_is_the_weighted_sum(alpha: float) -> None:
    pairs = random_pairs(equal=True)
    assert pairs.scores is not None
    method = TGDPO(BETA, alpha, f_chosen=lambda r: 1 + alpha * r, f_rejected=lambda r: 1 - alpha * r)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss, to_log_p, _ = loss_and_gradients(method, pairs)
    assert loss.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-15)
    weights = 1 + alpha * signs(pairs) * pairs.scores
    torch.testing.assert_close(to_log_p, -0.5 * BETA * signs(pairs) * weights)


def test_the_closed_form_is_the_optimum() -> None:
    """Of E[r / (beta f) - log(policy / reference)]: no random policy is better, and its gradient is 0 there."""
    random = torch.Generator().manual_seed(0)
    words = 6
    rewards, logits = (torch.randn(words, generator=random, dtype=torch.float64) for _ in range(2))
    reference = logits.log_softmax(-1)
    factor = 0.5 + torch.rand(words, generator=random, dtype=torch.float64)

    def value(log: Tensor) -> Tensor:
        return (log.exp() * (rewards / (BETA * factor) - log + reference)).sum(-1)

    best = guided_optimum(rewards, reference, factor, BETA)
    others = (best + torch.randn(10_000, words, generator=random, dtype=torch.float64)).log_softmax(-1)
    near = (best + 1e-3 * torch.randn(10_000, words, generator=random, dtype=torch.float64)).log_softmax(-1)
    assert (value(others) < value(best)).all()
    assert (value(near) < value(best)).all()
    moved = best.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(moved.log_softmax(-1)), moved)
    assert float(gradient.abs().max()) < 1e-12
    partition = (reference + rewards / (BETA * factor)).logsumexp(-1)
    torch.testing.assert_close(rewards, BETA * factor * (best - reference + partition), atol=1e-12, rtol=0)


def test_a_constant_changes_no_direction_of_a_pair() -> None:
    """grad log sigmoid(phi + delta) = sigmoid(-phi - delta) / sigmoid(-phi) x grad log sigmoid(phi)."""
    pairs = random_pairs(pairs=1)
    loss, plain, _ = loss_and_gradients(TGDPO(BETA, ALPHA), pairs)
    phi = -torch.log(torch.expm1(loss))
    for delta in (-3.0, -0.1, 2.0):
        weighted = (BETA * TGDPO(BETA, ALPHA).weights(pairs) * pairs.log_ratio).sum(1)
        moved = -logsigmoid(weighted[0] - weighted[1] + delta)
        (gradient,) = torch.autograd.grad(moved, pairs.log_p)
        ratio = torch.sigmoid(-phi - delta) / torch.sigmoid(-phi)
        torch.testing.assert_close(gradient, float(ratio) * plain)
        assert float(cosine_similarity(gradient.flatten(), plain.flatten(), dim=0)) == pytest.approx(1)


def test_different_constants_change_the_direction_of_a_batch() -> None:
    """What the elimination theorem does not say."""
    pairs = random_pairs()
    _, plain, _ = loss_and_gradients(TGDPO(BETA, ALPHA), pairs)
    weighted = (BETA * TGDPO(BETA, ALPHA).weights(pairs) * pairs.log_ratio).sum(1)
    delta = torch.tensor([-3.0, 0.0, 3.0]).double()
    moved = -logsigmoid(weighted[:3] - weighted[3:] + delta)
    (gradient,) = torch.autograd.grad(moved.sum(), pairs.log_p)
    assert float(cosine_similarity(gradient.flatten(), plain.flatten(), dim=0)) < 0.99


def test_weights_and_margins_are_bounded() -> None:
    """|alpha r| <= e: weights within e of 1, margins within e beta sum |log ratio| of DPO's."""
    pairs = random_pairs()
    assert pairs.scores is not None
    method = TGDPO(BETA, ALPHA)
    bound = ALPHA * float(pairs.scores.abs().max())
    weights = method.weights(pairs)
    assert float((weights[pairs.mask] - 1).abs().max()) <= bound + 1e-12
    margins = [-torch.log(torch.expm1(m(pairs).loss.detach())) for m in (method, DPO(BETA))]
    far = pairs.log_ratio.abs().sum(1).detach()
    assert ((margins[0] - margins[1]).abs() <= bound * BETA * (far[:3] + far[3:]) + 1e-12).all()
    assert float((margins[0] - margins[1]).abs().max()) > 1e-3


def test_liked_tokens_are_pulled_more_where_chosen_and_pushed_less_where_rejected() -> None:
    pairs = random_pairs(equal=True)  # where the margin stays 0, whatever the weights
    assert pairs.scores is not None
    _, before, _ = loss_and_gradients(TGDPO(BETA, ALPHA), pairs)
    for side, sign in ((0, 1), (3, -1)):
        token = int(pairs.mask[side].nonzero()[0])
        raised = pairs.scores.clone()
        raised[side, token] += 0.2
        _, after, _ = loss_and_gradients(TGDPO(BETA, ALPHA), replace(pairs, scores=raised))
        assert sign * (after.abs() - before.abs())[side, token] > 1e-3
        rest = torch.ones_like(pairs.mask)
        rest[side, token] = False
        torch.testing.assert_close(after[rest], before[rest])


def test_no_gradient_reaches_guide_or_reference_and_weights_know_no_policy() -> None:
    policy, reference, guide = (tiny_model("llama", seed) for seed in (0, 1, 2))
    scorer = guide_rewards(guide, reference, BETA)
    prompt, chosen, rejected = [1, 2], [3, 4, 5], [6, 7]
    pair = EncodedPair(prompt, chosen, rejected, scorer(prompt, chosen), scorer(prompt, rejected))
    batch = collate([pair])
    method = TGDPO(BETA, 0.01)
    pairs = read_pairs(policy, reference, batch, method.needs)
    before = method.weights(pairs)
    method(pairs).loss.sum().backward()
    assert all(p.grad is not None for p in policy.parameters())
    assert all(p.grad is None for model in (reference, guide) for p in model.parameters())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.01
    assert torch.equal(method.weights(read_pairs(policy, reference, batch, method.needs)), before)
    scored = replace(
        pairs, scores=pairs.scores.requires_grad_(True), log_p=pairs.log_p.detach().requires_grad_(True)
    )  # type: ignore[union-attr]
    method(scored).loss.sum().backward()
    assert scored.scores.grad is None  # type: ignore[union-attr]


def test_the_weights_of_models_have_beta_inside() -> None:
    """From the logits of guide and reference: 1 + alpha beta g where chosen, 1 - alpha beta g where rejected."""
    reference, guide = tiny_model("llama", 1), tiny_model("llama", 2)
    scorer = guide_rewards(guide, reference, BETA)
    prompt, chosen, rejected = [1, 2], [3, 4, 5], [6, 7]
    batch = collate([EncodedPair(prompt, chosen, rejected, scorer(prompt, chosen), scorer(prompt, rejected))])
    weights = TGDPO(BETA, 0.01).weights(read_pairs(reference, reference, batch, TGDPO.needs))
    for side, (response, sign) in enumerate(((chosen, 1), (rejected, -1))):
        ids = torch.tensor([prompt + response])
        places = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        one, other = (m(ids).logits[0, places].log_softmax(-1).detach() for m in (guide, reference))
        g = (one - other)[torch.arange(len(response)), torch.tensor(response)]
        expected = 1 + sign * 0.01 * BETA * g
        torch.testing.assert_close(weights[side][batch.mask[side]], expected, atol=1e-5, rtol=1e-4)
        assert float((expected - 1).abs().max()) > 1e-3


def test_padding_batching_and_order_are_nothing() -> None:
    pairs = random_pairs()
    method = TGDPO(BETA, ALPHA)
    together = method(pairs).loss
    torch.testing.assert_close(method(widened(pairs, 3, 1)).loss, together, atol=1e-12, rtol=0)
    for row in range(3):
        alone = Pairs(
            *(None if (v := getattr(pairs, n)) is None else v[[row, row + 3]] for n in Pairs.__dataclass_fields__)
        )
        torch.testing.assert_close(method(alone).loss, together[[row]], atol=1e-12, rtol=0)


def test_swapping_responses_and_the_sign_of_alpha_negates_the_margin() -> None:
    pairs = random_pairs()
    turned = TGDPO(BETA, f_chosen=lambda r: 1 - ALPHA * r, f_rejected=lambda r: 1 + ALPHA * r)
    one, other = TGDPO(BETA, ALPHA)(pairs).loss, turned(swapped(pairs)).loss
    torch.testing.assert_close(torch.exp(-one) + torch.exp(-other), torch.ones(3).double())
    unturned = TGDPO(BETA, ALPHA)(swapped(pairs)).loss
    assert not torch.allclose(torch.exp(-one) + torch.exp(-unturned), torch.ones(3).double(), atol=1e-4)


def test_weights_below_0_are_named_and_can_be_raised() -> None:
    pairs = random_pairs()
    with pytest.warns(UserWarning, match="of the weights are not above 0"):
        outcome = TGDPO(BETA, 5.0)(pairs)
    weights = outcome.channels["weight"][pairs.mask]
    assert outcome.metrics["weights_not_positive"] == pytest.approx(float((weights <= 0).double().mean()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        raised = TGDPO(BETA, 5.0, min_weight=0.1)(pairs)
    torch.testing.assert_close(raised.channels["weight"][pairs.mask], weights.clamp(min=0.1))
    assert raised.metrics["weights_not_positive"] == 0


def test_misuse() -> None:
    with pytest.raises(InputError, match="beta: -1 is not a number above 0"):
        TGDPO(-1)
    with pytest.raises(InputError, match=r"alpha: -0\.5 is not a number from 0 upwards"):
        TGDPO(alpha=-0.5)
    with pytest.raises(InputError, match="pairs: the method needs `scores`"):
        TGDPO()(replace(random_pairs(), scores=None))
    with pytest.raises(InputError, match="ref_model: it knows 33 tokens and the policy 97"):
        guide_rewards(tiny_model("llama"), tiny_model("llama", vocab_size=33))
