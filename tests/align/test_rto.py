"""RTO's arithmetic: rewards by token, advantages, losses, and where PPO with them ends on a tree of all texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenworks.align.pessimism import PessimisticTokenReward, soft_value_iteration
from tokenworks.align.rto import (
    check_sentence_rewards,
    dense_rewards,
    dense_term,
    gae,
    last_index,
    policy_loss,
    token_totals,
    value_loss,
    whiten,
)
from tokenworks.core.errors import InputError

WORDS, LENGTH = 3, 3


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()


def rewards(**changes: Any) -> Tensor:
    plain = {
        "log_dpo": numbers(3, 5, seed=1), "log_ref": numbers(3, 5, seed=2), "log_old": numbers(3, 5, seed=3),
        "mask": MASK, "sentence": numbers(3, seed=4), "beta1": 0.3, "beta2": 0.2, "beta3": 2.0, "dpo_clip": None,
    }  # fmt: skip
    return dense_rewards(**(plain | changes))  # type: ignore[arg-type]


# --- rewards -------------------------------------------------------------------------------------------------


def test_without_a_clamp_the_rewards_sum_to_those_of_the_text() -> None:
    log_dpo, log_ref, log_old = (torch.where(MASK, numbers(3, 5, seed=s), 0.0) for s in (1, 2, 3))
    expected = 0.3 * (log_dpo - log_ref).sum(1) - 0.2 * (log_old - log_ref).sum(1) + 2.0 * numbers(3, seed=4)
    torch.testing.assert_close(rewards().sum(1), expected)
    assert (rewards()[~MASK] == 0).all()


def test_the_sentence_counts_at_the_last_token_written() -> None:
    alone = rewards(beta1=0.0, beta2=0.0, sentence=torch.tensor([1.0, 2.0, 30.0]))
    assert last_index(MASK).tolist() == [4, 2, 0]
    assert alone[range(3), [4, 2, 0]].tolist() == [2.0, 4.0, 20.0]  # clamped to 10, then beta3
    assert int((alone != 0).sum()) == 3
    empty = rewards(mask=torch.zeros(3, 5).bool())
    assert (empty == 0).all()


def test_the_clamp_is_on_every_token_after_scaling() -> None:
    ratio = 100 * numbers(4, 7, seed=5)
    found = dense_term(ratio, 0.05, 0.05)
    assert found.abs().max() <= 0.05
    assert dense_term(torch.tensor(0.5), 0.05, 0.05) == pytest.approx(0.025)  # clamped before, it would be 0.0025
    torch.testing.assert_close(dense_term(ratio, 0.05, None), 0.05 * ratio)


def test_without_the_dpo_model_it_is_ppo() -> None:
    ppo = rewards(beta1=0.0)
    torch.testing.assert_close(ppo, rewards(log_dpo=numbers(3, 5, seed=2)), atol=0, rtol=0)  # dpo = ref
    by_hand = torch.where(MASK, -0.2 * (numbers(3, 5, seed=3) - numbers(3, 5, seed=2)), 0.0)
    by_hand[range(3), [4, 2, 0]] += 2.0 * numbers(3, seed=4)
    torch.testing.assert_close(ppo, by_hand)
    assert not torch.allclose(ppo, rewards())


# --- advantages and losses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_advantages_are_the_sum_of_what_follows(gamma: float, lam: float) -> None:
    reward, value = numbers(3, 5, seed=1), numbers(3, 5, seed=2)
    found = gae(reward, value, MASK, gamma, lam)
    for row, length in enumerate(MASK.sum(1).tolist()):
        v = [*value[row, :length].tolist(), 0.0]
        delta = [float(reward[row, t]) + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, length))
            assert float(found.advantages[row, t]) == pytest.approx(expected)
            if lam == 1 and gamma == 1:
                assert expected == pytest.approx(float(reward[row, t:length].sum()) - v[t])
            if lam == 0:
                assert expected == pytest.approx(delta[t])
    assert (found.advantages[~MASK] == 0).all()
    torch.testing.assert_close(found.returns[MASK], (found.advantages + value)[MASK])
    padded = [torch.cat([x, numbers(3, 2, seed=9)], 1) for x in (reward, value)]
    again = gae(padded[0], padded[1], torch.cat([MASK, torch.zeros(3, 2).bool()], 1), gamma, lam)
    torch.testing.assert_close(again.advantages[:, :5], found.advantages)
    torch.testing.assert_close(again.returns[:, :5], found.returns)


def test_whitening_is_over_the_whole_buffer() -> None:
    values = numbers(3, 5, seed=1) * 7 + 3
    found = whiten(values, MASK)
    assert float(found[MASK].mean()) == pytest.approx(0, abs=1e-6)
    assert float(found[MASK].std(correction=0)) == pytest.approx(1, rel=1e-6)
    assert (found[~MASK] == 0).all()
    totals = token_totals(values[:1], MASK[:1]) + token_totals(values[1:], MASK[1:])
    parts = torch.cat([whiten(values[:1], MASK[:1], totals), whiten(values[1:], MASK[1:], totals)])
    torch.testing.assert_close(parts, found)


def test_at_first_the_loss_is_reinforce() -> None:
    log_p = numbers(3, 5, seed=1).requires_grad_(True)
    advantages = torch.where(MASK, numbers(3, 5, seed=2), 0.0)
    loss = policy_loss(log_p, log_p.detach(), advantages, MASK)
    loss.backward()
    each = advantages.sum(1) / MASK.sum(1)
    assert loss.item() == pytest.approx(-each.mean().item())
    torch.testing.assert_close(log_p.grad, -advantages / MASK.sum(1, keepdim=True) / 3)


def test_the_losses_are_clipped() -> None:
    old = torch.zeros(1, 4)
    log_p = torch.tensor([[1.0, 1.0, -1.0, -1.0]]).requires_grad_(True)
    policy_loss(log_p, old, torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.ones(1, 4).bool()).backward()
    assert (log_p.grad != 0).tolist() == [[False, True, True, False]]  # what went far enough is left alone
    values = torch.tensor([[1.0, 0.1]]).requires_grad_(True)
    loss = value_loss(values, torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]), torch.ones(1, 2).bool(), 0.2)
    assert float(loss) == pytest.approx(0.5 * (max(0.25, 0.09) + 0.16) / 2)


# --- on a tree -----------------------------------------------------------------------------------------------


def tree(seed: int) -> list[Tensor]:
    """Log-probabilities [3^t, 3] for every text so far."""
    return [numbers(WORDS**t, WORDS, seed=10 * seed + t).log_softmax(1) for t in range(LENGTH)]


def whole_texts(logs: list[Tensor]) -> Tensor:
    """float [27]: of all texts, from what stands at their tokens."""
    found = logs[0][0]
    for log in logs[1:]:
        found = (found[:, None] + log).flatten()
    return found


def test_potentials_change_no_optimum() -> None:
    ref, reward = tree(1), [numbers(WORDS**t, WORDS, seed=50 + t) for t in range(LENGTH)]
    best, values = soft_value_iteration(reward, ref, 0.7)
    sums = whole_texts(ref) + whole_texts(reward) / 0.7
    torch.testing.assert_close(whole_texts(best), sums.log_softmax(0))  # Gibbs's form
    after = [*(v.view(-1, WORDS) for v in values[1:]), torch.zeros(WORDS**LENGTH).view(-1, WORDS)]
    for scale in (0.5, 1.0, -3.0):
        shaped = [r + scale * (a - v[:, None]) for r, a, v in zip(reward, after, values, strict=True)]
        for one, two in zip(soft_value_iteration(shaped, ref, 0.7)[0], best, strict=True):
            torch.testing.assert_close(one, two)
    # What DPO's log-ratio is: the reward with the potential of the optimum itself.
    ratio = [0.7 * (b - r) for b, r in zip(best, ref, strict=True)]
    for one, two, a, v, r in zip(ratio, reward, after, values, ref, strict=True):
        torch.testing.assert_close(one, two + a - v[:, None])
        assert r.shape == one.shape
    for one, two in zip(soft_value_iteration(ratio, ref, 0.7)[0], best, strict=True):
        torch.testing.assert_close(one, two)


def ppo_on_the_tree(ref: list[Tensor], dpo: list[Tensor], beta1: float, beta2: float, rounds: int = 250) -> Tensor:
    """RTO's loop with tables for actor and critic and the trainer's own functions; probabilities of all texts."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.tensor([0, 1, 4])  # of the rows of each place in one table
    log_ref, log_dpo = (torch.cat(logs).float() for logs in (ref, dpo))
    actor, critic = log_ref.clone().requires_grad_(True), torch.zeros(13, requires_grad=True)
    optimizers = torch.optim.Adam([actor], 0.05), torch.optim.Adam([critic], 0.05)
    mask = torch.ones(512, LENGTH).bool()
    for step in range(rounds):
        texts = torch.zeros(512, dtype=torch.long)
        rows, tokens = [], []
        for place in range(LENGTH):
            rows.append(starts[place] + texts)
            drawn = torch.multinomial(actor.detach().softmax(1)[rows[-1]], 1, generator=generator)[:, 0]
            tokens.append(drawn)
            texts = WORDS * texts + drawn
        at, said = torch.stack(rows, 1), torch.stack(tokens, 1)
        old = actor.detach().log_softmax(1)[at, said]
        reward = dense_rewards(
            log_dpo[at, said], log_ref[at, said], old, mask, torch.zeros(512), beta1, beta2, 0.0, None
        )
        values = critic.detach()[at]
        advantages, returns = gae(reward, values, mask)
        advantages = whiten(advantages, mask)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / rounds)
        for _ in range(2):
            loss = policy_loss(actor.log_softmax(1)[at, said], old, advantages, mask)
            loss = loss + value_loss(critic[at], values, returns, mask)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    final = actor.detach().double().log_softmax(1)
    return whole_texts([final[:1], final[1:4], final[4:]]).exp()


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_the_dense_reward_alone_ends_between_reference_and_dpo_model(ratio: float) -> None:
    """At ref^(1 - b1/b2) dpo^(b1/b2), as whole texts; with b1 = b2 at the DPO model itself."""
    ref, dpo = tree(1), tree(2)
    found = ppo_on_the_tree(ref, dpo, ratio, 1.0)
    expected = ((1 - ratio) * whole_texts(ref) + ratio * whole_texts(dpo)).softmax(0)
    assert 0.5 * float((found - expected).abs().sum()) < 0.05
    assert 0.5 * float((whole_texts(ref).exp() - expected).abs().sum()) > 0.15  # and began elsewhere
    if ratio == 1:
        torch.testing.assert_close(expected, whole_texts(dpo).exp())


# --- the theory ----------------------------------------------------------------------------------------------


def preferences(pairs: int, seed: int, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features of texts, the likelier preferred one first; the last feature never differs."""
    rng = np.random.default_rng(seed)
    one, two = rng.normal(size=(2, pairs, len(theta)))
    two[:, -1] = one[:, -1]
    first = rng.random(pairs) < 1 / (1 + np.exp(-(one - two) @ theta))
    return np.where(first[:, None], one, two), np.where(first[:, None], two, one)


def test_the_rewards_are_found_as_pairs_grow() -> None:
    theta = np.array([1.0, -0.5, 0.3, 2.0])
    errors = []
    for pairs in (200, 3200):
        found = [PessimisticTokenReward(caution=0.0).fit(*preferences(pairs, s, theta)).theta for s in range(8)]
        assert np.abs([each[-1] for each in found]).max() < 1e-6  # no pair tells; it stays 0
        errors.append(np.sqrt(np.mean([((each - theta)[:-1] ** 2).sum() for each in found])))
    assert errors[1] < 0.15
    assert 2 < errors[0] / errors[1] < 8  # sixteen times the pairs, a fourth of the error


def test_pessimism() -> None:
    theta, features = np.array([1.0, -0.5, 0.3]), np.random.default_rng(1).normal(size=(50, 4, 3))
    data = preferences(100, 0, theta)
    nu = features[0, 0]
    bold, wary = (PessimisticTokenReward(c, nu=nu).fit(*data) for c in (0.0, 2.0))
    np.testing.assert_allclose(bold(features), features @ bold.theta)
    assert (wary(features) <= bold(features) + 1e-12).all()
    assert wary(nu) == pytest.approx(bold(nu))
    assert (wary(features[1]) < bold(features[1])).all()
    more = PessimisticTokenReward(2.0, nu=nu).fit(*(np.concatenate([d] * 20) for d in data))
    assert ((bold(features) - wary(features)) > (features @ more.theta - more(features)) - 1e-9).all()


def test_the_norm_is_bounded() -> None:
    x = np.array([[1.0, 0.5], [0.2, 1.0]])
    found = PessimisticTokenReward(bound=2.0).fit(x, np.zeros_like(x))  # separable: it would grow without end
    assert np.linalg.norm(found.theta) == pytest.approx(2.0, rel=1e-3)
    assert (x @ found.theta > 0).all()


def episodes_to_find(depth: int, dense: bool, seeds: int = 20, words: int = 4, batch: int = 8) -> np.ndarray:
    """How many texts PPO writes until the rewarded one of words^depth is the likeliest, for each seed.

    The dense reward is the telescoped one: what a right token adds to the value of the text so far.
    """
    generator = torch.Generator().manual_seed(depth)
    actor = torch.zeros(seeds, depth, words, requires_grad=True)  # off the right path no token matters
    optimizer = torch.optim.Adam([actor], 0.1)
    found = np.zeros(seeds)
    for step in range(20_000):
        p = actor.detach().softmax(2)
        said = torch.multinomial(p.flatten(0, 1), batch, True, generator=generator).view(seeds, depth, batch)
        right = (said == 0).transpose(1, 2).float()  # [seeds, batch, depth]
        upto = right.cumprod(2)
        reward = upto / depth
        if not dense:
            reward = torch.zeros_like(upto)
            reward[..., -1] = upto[..., -1]
        flat = reward.flatten(0, 1)
        mask = torch.ones_like(flat).bool()
        advantages = gae(flat, torch.zeros_like(flat), mask, 1.0, 1.0).advantages.view(seeds, batch, depth)
        advantages = advantages - advantages.mean(1, keepdim=True)
        log = actor.log_softmax(2).gather(2, said).transpose(1, 2).flatten(0, 1)
        loss = policy_loss(log, log.detach(), advantages.flatten(0, 1), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done = (p[..., 0] > 0.5).all(1).numpy()
        found = np.where((found == 0) & done, (step + 1) * batch, found)
        if found.all():
            break
    assert found.all()
    return found


def test_episodes_grow_faster_without_token_rewards() -> None:
    """In the logarithm, with the depth: steeply for a reward at the end, hardly for one at every token."""
    depths = [2, 3, 4, 5]
    slopes = [
        np.polyfit(depths, [np.log(np.median(episodes_to_find(depth, dense))) for depth in depths], 1)[0]
        for dense in (False, True)
    ]
    assert slopes[0] > 0.6
    assert slopes[1] < slopes[0] / 2


# --- misuse --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sentence": torch.zeros(2)}, r"rewards: shape \[2\] for 3 texts"),
        ({"sentence": torch.tensor([0.0, float("nan"), 0.0])}, "rewards: that of text 1 is nan"),
        ({"dpo_clip": -0.1}, "dpo_clip: -0.1"),
        ({"beta2": -1.0}, "beta2: -1.0"),
        ({"log_ref": torch.zeros(3, 4)}, r"log_ref: shape \[3, 4\], and mask has \[3, 5\]"),
    ],
)
def test_bad_rewards(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        rewards(**changes)


def test_bad_numbers() -> None:
    some = torch.zeros(3, 5)
    with pytest.raises(InputError, match=r"lam: 1\.5 is not in \[0, 1\]"):
        gae(some, some, MASK, 1.0, 1.5)
    with pytest.raises(InputError, match=r"clip: -0\.2"):
        policy_loss(some, some, some, MASK, -0.2)
    with pytest.raises(InputError, match=r"clip: -0\.2"):
        value_loss(some, some, some, MASK, -0.2)
    with pytest.raises(InputError, match="rewards: shape"):
        check_sentence_rewards(torch.zeros(3, 1), 3)


def test_bad_theory() -> None:
    with pytest.raises(InputError, match="caution: -1"):
        PessimisticTokenReward(caution=-1)
    with pytest.raises(InputError, match="fit first"):
        PessimisticTokenReward()(np.zeros(2))
    with pytest.raises(InputError, match="rejected: shape"):
        PessimisticTokenReward().fit(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(InputError, match="not all features are finite"):
        PessimisticTokenReward().fit(np.full((2, 3), np.nan), np.zeros((2, 3)))
    with pytest.raises(InputError, match="features: shape"):
        PessimisticTokenReward().fit(np.eye(3), np.zeros((3, 3)))(np.zeros(2))
