"""TDPO: the identity it rests on, values and gradients in closed form, and its optimum on an enumerable toy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, logsigmoid
from transformers import PreTrainedModel

from tests.align.made_up import loss_and_gradients, random_pairs, swapped, widened
from tests.conftest import tiny_model
from tokenworks.align.contract import Pairs
from tokenworks.align.dpo import DPO
from tokenworks.align.reading import EncodedPair, collate, read_pairs
from tokenworks.align.tdpo import TDPO, token_advantages
from tokenworks.core.errors import InputError

BETA, ALPHA = 0.3, 0.7


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distribution_pairs(policy: Tensor, reference: Tensor, labels: Tensor) -> Pairs:
    """Log-probabilities [2B, T, V] of both models at the states of responses [2B, T]."""
    row = labels[..., None]
    return Pairs(
        policy.gather(-1, row)[..., 0],
        reference.gather(-1, row)[..., 0],
        torch.ones(labels.shape, dtype=torch.bool),
        (reference.exp() * (reference - policy)).sum(-1),
    )


def test_the_advantage_is_the_log_ratio_and_the_divergence() -> None:
    """Of any reference, Q and beta, with the optimal policy by its closed form."""
    words = 9
    for seed in range(5):
        reference, q = double(words, seed=seed).log_softmax(-1), double(words, seed=seed + 10)
        best = (reference + q / BETA).log_softmax(-1)
        expected = q - (reference.exp() * q).sum()
        every = torch.arange(words)[:, None].repeat(2, 1)
        pairs = distribution_pairs(best.expand(2 * words, 1, -1), reference.expand(2 * words, 1, -1), every)
        advantages = token_advantages(pairs, BETA)[:words, 0]
        torch.testing.assert_close(advantages, expected, atol=1e-10, rtol=0)
        assert float((reference.exp() * advantages).sum()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_the_loss_is_the_papers(variant: str) -> None:
    pairs = random_pairs()
    m_w, m_l = pairs.log_ratio.sum(1).chunk(2)
    d_w, d_l = pairs.divergence.sum(1).chunk(2)  # type: ignore[union-attr]
    alpha = 1.0 if variant == "tdpo1" else ALPHA
    outcome = TDPO(BETA, ALPHA, variant)(pairs)
    margin = BETA * (m_w - m_l) - alpha * BETA * (d_l - d_w)
    torch.testing.assert_close(outcome.loss, -logsigmoid(margin), atol=1e-12, rtol=0)
    rewards = BETA * torch.cat([m_w + d_w, m_l + d_l])
    torch.testing.assert_close(outcome.rewards, rewards, atol=1e-12, rtol=0)
    assert not outcome.rewards.requires_grad
    for name, values in outcome.channels.items():
        assert not values.requires_grad
        assert (values[~pairs.mask] == 0).all()
        assert outcome.descriptions[name]
    torch.testing.assert_close(outcome.channels["advantage"].sum(1), outcome.rewards)
    assert outcome.metrics["kl/chosen"] == pytest.approx(float(d_w.detach().mean()))
    assert outcome.metrics["kl/rejected"] == pytest.approx(float(d_l.detach().mean()))


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_gradients_in_closed_form(variant: str) -> None:
    """With g = beta sigmoid(-beta u): -g and g to chosen and rejected log-probabilities; to the divergences
    alpha g on rejected tokens, and on chosen ones -g in TDPO1 and nothing in TDPO2."""
    pairs = random_pairs()
    loss, to_log_p, to_divergence = loss_and_gradients(TDPO(BETA, ALPHA, variant), pairs)
    g = (BETA * (1 - torch.exp(-loss)))[:, None]
    chosen, rejected = (mask.double() for mask in pairs.mask.chunk(2))
    torch.testing.assert_close(to_log_p, torch.cat([-g * chosen, g * rejected]))
    alpha = 1.0 if variant == "tdpo1" else ALPHA
    to_chosen, to_rejected = to_divergence.chunk(2)
    torch.testing.assert_close(to_rejected * rejected, alpha * g * rejected)
    torch.testing.assert_close(to_chosen * chosen, -g * chosen if variant == "tdpo1" else torch.zeros_like(chosen))


def test_the_two_variants_differ_in_the_chosen_divergence_alone() -> None:
    """At alpha = 1: one value, and gradients that differ by sigmoid(-beta u) beta grad D_w."""
    pairs = random_pairs()
    first, second = (loss_and_gradients(TDPO(BETA, 1.0, variant), pairs) for variant in ("tdpo1", "tdpo2"))
    torch.testing.assert_close(first[0], second[0])
    torch.testing.assert_close(first[1], second[1])
    weight = BETA * (1 - torch.exp(-first[0]))[:, None]
    expected = torch.cat([weight.expand(-1, pairs.mask.shape[1]), torch.zeros(3, pairs.mask.shape[1])])
    torch.testing.assert_close(second[2] - first[2], expected * pairs.mask)


def test_without_alpha_it_is_dpo_bit_for_bit() -> None:
    pairs = random_pairs()
    ours, theirs = (loss_and_gradients(method, pairs) for method in (TDPO(BETA, 0.0), DPO(BETA)))
    # DPO multiplies by beta before it sums.
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-15, rtol=1e-15)


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_the_first_step_is_dpos(variant: str) -> None:
    """Where policy and reference are one model the divergence has no gradient, and the loss is log 2."""
    policy, reference = tiny_model("llama"), tiny_model("llama")
    batch = collate([EncodedPair([1, 2], [3, 4, 5], [6, 7]), EncodedPair([8], [9, 10], [11, 12, 13])])
    found = []
    for method in (TDPO(BETA, ALPHA, variant), DPO(BETA)):
        outcome = method(read_pairs(policy, reference, batch, method.needs))
        assert outcome.loss.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-6)
        outcome.loss.sum().backward()
        found.append([p.grad.clone() for p in policy.parameters()])  # type: ignore[union-attr]
        policy.zero_grad()
    assert max(float(grad.abs().max()) for grad in found[0]) > 0.1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_divergence_is_forward_and_of_the_whole_vocabulary(tiny_llama: PreTrainedModel) -> None:
    reference = tiny_model("llama", seed=1)
    pair = EncodedPair([1, 2, 3], [4, 5, 6], [7, 8])
    outcome = TDPO()(read_pairs(tiny_llama, reference, collate([pair]), TDPO.needs))
    for side, response in enumerate((pair.chosen, pair.rejected)):
        ids = torch.tensor([pair.prompt + response])
        places = slice(len(pair.prompt) - 1, len(pair.prompt) + len(response) - 1)
        ours, theirs = (m(ids).logits[0, places].log_softmax(-1) for m in (tiny_llama, reference))
        forward, reverse = (
            float(kl_div(a, b, reduction="sum", log_target=True)) for a, b in ((ours, theirs), (theirs, ours))
        )
        assert float(outcome.channels["kl"][side].sum()) == pytest.approx(forward, rel=1e-4)
        assert abs(forward - reverse) > 0.1
        assert (outcome.channels["kl"][side] >= 0).all()
    same = TDPO()(read_pairs(reference, reference, collate([pair]), TDPO.needs))
    assert float(same.channels["kl"].abs().max()) < 1e-5


def test_padding_is_nothing_and_swapping_negates() -> None:
    pairs = random_pairs()
    for method in (TDPO(BETA, ALPHA, "tdpo1"), TDPO(BETA, ALPHA)):
        torch.testing.assert_close(method(widened(pairs, 2, 3)).loss, method(pairs).loss, atol=1e-12, rtol=0)
    one, other = (TDPO(BETA, variant="tdpo1")(each).loss for each in (pairs, swapped(pairs)))
    # -log sigmoid(z) and -log sigmoid(-z)
    torch.testing.assert_close(torch.exp(-one) + torch.exp(-other), torch.ones(3).double())


def test_the_loss_rises_with_the_rejected_divergence_and_falls_with_the_margin() -> None:
    pairs = random_pairs()
    _, to_log_p, to_divergence = loss_and_gradients(TDPO(BETA, ALPHA), pairs)
    chosen, rejected = pairs.mask.chunk(2)
    assert (to_divergence[3:][rejected] > 0).all()
    assert (to_log_p[:3][chosen] < 0).all()
    assert (to_log_p[3:][rejected] > 0).all()


def test_the_optimum_of_an_enumerable_toy() -> None:
    """Three words, three tokens: labels from the summed advantages of a known policy, and tables for policies.

    The expected TDPO1 loss over all pairs of texts is least at that policy.
    """
    words, length = 3, 3
    texts = torch.tensor(list(itertools.product(range(words), repeat=length)))
    states = [(0, 1), (1, 3), (4, 9)]  # where the tables of each length begin, and how many there are

    def at(table: Tensor) -> Tensor:
        """Log-probabilities at the states of every text: [27, 3, 3]."""
        log = table.log_softmax(-1)
        places = torch.zeros(len(texts), dtype=torch.long)
        rows = []
        for step, (begin, _) in enumerate(states):
            rows.append(log[begin + places])
            places = places * words + texts[:, step]
        return torch.stack(rows, 1)

    reference, target = at(double(13, words, seed=1)), at(double(13, words, seed=2))
    ones, others = (torch.tensor(side) for side in zip(*itertools.permutations(range(len(texts)), 2), strict=True))
    both = torch.cat([ones, others])

    def pairs(policy: Tensor) -> Pairs:
        return distribution_pairs(policy[both], reference[both], texts[both])

    total = token_advantages(pairs(target), BETA).sum(1)
    preferred = torch.sigmoid(total[: len(ones)] - total[len(ones) :])
    table = double(13, words, seed=1).requires_grad_(True)
    method = TDPO(BETA, variant="tdpo1")
    optimizer = torch.optim.LBFGS(
        [table], max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (preferred * method(pairs(at(table))).loss).sum()
        loss.backward()
        return loss

    begun = float(closure())
    optimizer.step(closure)  # type: ignore[no-untyped-call]
    assert float(closure()) < begun
    assert float((at(table).exp() - target.exp()).abs().max()) < 1e-2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"beta": 0.0}, "beta: 0.0 is not a number above 0"),
        ({"beta": float("nan")}, "beta: nan"),
        ({"alpha": -0.1}, "alpha: -0.1 is not a number from 0 upwards"),
        ({"variant": "tdpo3"}, "variant: no 'tdpo3'; there are tdpo1, tdpo2"),
    ],
)
def test_misuse(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        TDPO(**arguments)  # type: ignore[arg-type]


def test_divergences_are_asked_for() -> None:
    full = random_pairs()
    with pytest.raises(InputError, match="pairs: the method needs `divergence`"):
        TDPO()(Pairs(full.log_p, full.log_ref, full.mask))
