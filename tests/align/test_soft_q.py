"""The exact optimum: against enumeration, its identities, its limits, and DPO finding it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tokenworks.align.soft_q import Reward, SoftQSolver, Text, recover_by_dpo
from tokenworks.core.errors import InputError

V, T = 3, 4


def table(seed: int, scale: float = 1.0) -> dict[Text, Tensor]:
    """Random numbers for the tokens after every text."""
    generator = torch.Generator().manual_seed(seed)
    return {
        text: scale * torch.randn(V, generator=generator, dtype=torch.float64)
        for length in range(T + 1)
        for text in itertools.product(range(V), repeat=length)
    }


def solver(seed: int = 0, beta: float = 0.7, reward: Reward | None = None, end: int | None = None) -> SoftQSolver:
    rewards, logits = table(2 * seed), table(2 * seed + 1)
    return SoftQSolver(
        reward or (lambda text, token: float(rewards[text][token])), lambda text: logits[text], V, T, beta, end
    )


@pytest.mark.parametrize("end", [None, 0])
@pytest.mark.parametrize("seed", range(3))
def test_the_policy_over_whole_texts_is_the_tilted_reference(seed: int, end: int | None) -> None:
    found = solver(seed, end=end)
    texts = found.texts()
    assert len(texts) == (V**T if end is None else sum(2**k for k in range(T - 1)) + 2 ** (T - 1) * 3)
    weights = {
        text: math.exp(found.total(found.log_ref, text) + found.total(found.rewards, text) / found.beta)
        for text in texts
    }
    z = sum(weights.values())
    assert sum(math.exp(found.total(found.log_ref, text)) for text in texts) == pytest.approx(1, abs=1e-12)
    for text in texts:
        assert math.exp(found.total(found.log_policy, text)) == pytest.approx(weights[text] / z, abs=1e-14)
    assert found.values[()] == pytest.approx(found.beta * math.log(z), abs=1e-12)


@pytest.mark.parametrize("end", [None, 0])
def test_telescoping_and_the_bellman_identity(end: int | None) -> None:
    found = solver(1, end=end)
    for state in found.log_policy:
        own = found.rewards[state] + found.value_differences(state)
        assert torch.allclose(found.advantages(state), own, atol=1e-12)
        q = found.rewards[state] + found.beta * found.log_ref[state] + found.value_differences(state)
        assert torch.allclose(found.q[state] - found.values[state], q, atol=1e-12)
    for text in found.texts():
        implicit = sum(float(found.advantages(state)[token]) for state, token in found.steps(text))
        assert found.total(found.rewards, text) == pytest.approx(found.values[()] + implicit, abs=1e-12)
    assert all(found.values[text] == 0 for text in found.texts())


def test_shaping_changes_nothing_that_can_be_seen() -> None:
    plain, rewards = solver(2), table(4)
    potential = {text: float(torch.randn((), generator=torch.Generator().manual_seed(hash(text) % 2**31)))
                 if len(text) < T else 0.0 for text in table(0)}  # fmt: skip
    potential[()] = 0.4
    shaped = solver(2, reward=lambda s, a: float(rewards[s][a]) + potential[(*s, a)] - potential[s])
    assert max(abs(float(plain.rewards[s][0] - shaped.rewards[s][0])) for s in plain.rewards) > 0.1
    for state in plain.log_policy:
        assert torch.allclose(plain.log_policy[state], shaped.log_policy[state], atol=1e-12)
        assert torch.allclose(plain.advantages(state), shaped.advantages(state), atol=1e-12)
    for one, other in itertools.combinations(plain.texts()[::7], 2):
        margins = [s.total(s.rewards, one) - s.total(s.rewards, other) for s in (plain, shaped)]
        assert margins[0] == pytest.approx(margins[1], abs=1e-12)
    # A potential that does not vanish at the end is no shaping: the optimum moves.
    broken = solver(2, reward=lambda s, a: float(rewards[s][a]) + (0.5 * a if len(s) == T - 1 else 0.0))
    assert any(not torch.allclose(plain.log_policy[s], broken.log_policy[s], atol=1e-3) for s in plain.log_policy)


def test_every_class_has_one_implicit_reward() -> None:
    """Two policies whose implicit rewards differ by a shaping are one policy. A shaping that took one to the other
    would have to satisfy, at every state, logsumexp(log policy + (potential difference) / beta) = 0; backward from
    the last step, where the potential behind is 0, that leaves 0 at every state, and 0 alone."""
    found = solver(3)
    potential: dict[Text, float] = dict.fromkeys(found.texts(), 0.0)
    for state in sorted(found.log_policy, key=len, reverse=True):
        below = torch.tensor([potential[(*state, token)] for token in range(V)], dtype=torch.float64)
        # beta log sum_a pi(a) exp((below - own) / beta) = 0 has one solution for `own`.
        potential[state] = float(found.beta * torch.logsumexp(found.log_policy[state] + below / found.beta, 0))
    assert max(map(abs, potential.values())) < 1e-12
    # And with another potential the shaped implicit reward is no policy's: its exponentials do not sum to 1.
    potential[(0,)] = 0.3
    below = torch.tensor([potential[(token,)] for token in range(V)], dtype=torch.float64)
    total = torch.logsumexp(found.log_policy[()] + below / found.beta, 0)
    assert abs(float(total)) > 1e-3


@pytest.mark.parametrize("sparse", [False, True], ids=["a reward a token", "a reward at the end"])
def test_dpo_recovers_the_optimum(sparse: bool) -> None:
    rewards, logits = table(10), table(11)
    horizon = 3

    def reward(text: Text, token: int) -> float:
        return float(rewards[text][token]) if not sparse or len(text) == horizon - 1 else 0.0

    found = SoftQSolver(reward, lambda text: logits[text], V, horizon, beta=0.7)
    recovered = recover_by_dpo(found, steps=500)
    assert recovered.errors[0] > 0.2
    assert recovered.errors[-1] < 1e-2
    for state, log_policy in recovered.log_policy.items():
        dense = found.beta * (log_policy - found.log_ref[state])
        likely = found.log_policy[state] > math.log(1e-2)
        expected = found.rewards[state] + found.value_differences(state)
        assert torch.allclose(dense[likely], expected[likely], atol=5e-2)
        if sparse and len(state) < horizon - 1:
            assert float(expected.abs().max()) > 0.02, "credit before the reward"


def test_the_limits_of_beta() -> None:
    cold, hot = solver(5, beta=1e-3), solver(5, beta=1e4)
    for state in hot.log_policy:
        assert torch.allclose(hot.log_policy[state].exp(), hot.log_ref[state].exp(), atol=1e-3)
    best = max(cold.texts(), key=lambda text: cold.total(cold.rewards, text))
    assert math.exp(cold.total(cold.log_policy, best)) == pytest.approx(1, abs=1e-6)
    assert cold.values[()] == pytest.approx(cold.total(cold.rewards, best), abs=0.02)


def test_misuse() -> None:
    flat = torch.zeros(V)
    for changes, said in (
        ({"beta": 0.0}, "beta: 0.0"),
        ({"vocab": 1}, "vocab, horizon"),
        ({"horizon": 0}, "vocab, horizon"),
        ({"horizon": 12}, "too many to enumerate"),
        ({"ref_fn": lambda text: torch.zeros(2)}, "ref_fn: gave"),
        ({"reward_fn": lambda text, token: math.nan}, "not finite after"),
    ):
        chosen = {"reward_fn": lambda s, a: 0.0, "ref_fn": lambda s: flat, "vocab": V, "horizon": 2, "beta": 1.0}
        with pytest.raises(InputError, match=said):
            SoftQSolver(**(chosen | changes))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="steps, every"):
        recover_by_dpo(solver(), steps=0)
