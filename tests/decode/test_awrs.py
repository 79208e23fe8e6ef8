"""AWRS: proper weights by enumeration, the law of the token, and how often the constraint is asked."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from tokenworks.core.errors import InputError, NumericalError
from tokenworks.core.fit import goodness_of_fit
from tokenworks.decode import awrs
from tokenworks.decode.awrs import SAMPLERS, Sampler, geometric, recursive, sampler, two_pass

PROPER = ("awrs", "two-pass", "recursive", "geometric", "rejection", "masked", "proposal")


def orders(p: Tensor) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every order in which the tokens can be drawn without replacement, with its probability."""
    for order in itertools.permutations(range(len(p))):
        chance, left = 1.0, 1.0
        for token in order:
            chance *= float(p[token]) / left if left > 1e-15 else 1.0
            left -= float(p[token])
        yield order, chance


def enumerate_weights(
    draw: Sampler, p: Tensor, allowed: list[bool], passes: int, patch: pytest.MonkeyPatch
) -> Tensor:
    """E[w 1(token = i)] for every i, exactly."""
    found = torch.zeros(len(p), dtype=torch.float64)
    for chosen in itertools.product(list(orders(p)), repeat=passes):
        runs = iter(order for order, _ in chosen)
        patch.setattr(awrs, "without_replacement", lambda p, generator, runs=runs: iter(next(runs)))
        drawn = draw(p.log(), lambda token: allowed[token], None)
        if drawn.token is not None:
            found[drawn.token] += math.prod(chance for _, chance in chosen) * math.exp(drawn.log_weight)
    return found


@pytest.mark.parametrize(
    "allowed", [(1, 0, 0, 1), (0, 1, 1, 1), (0, 0, 0, 1), (1, 1, 1, 1), (0, 1, 0, 0), (0,) * 4]
)
@pytest.mark.parametrize(("name", "passes"), [("two-pass", 2), ("recursive", 1)])
def test_properly_weighted_by_enumeration(
    name: str, passes: int, allowed: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    found = enumerate_weights(SAMPLERS[name], p, [bool(a) for a in allowed], passes, monkeypatch)
    torch.testing.assert_close(found, p * torch.tensor(allowed), atol=1e-12, rtol=0)


def test_properly_weighted_on_five_tokens_with_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.softmax(torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 0)
    allowed = [False, True, False, False, True]
    for limit in (2, 3):
        found = enumerate_weights(
            lambda log_p, accept, g, limit=limit: recursive(log_p, accept, g, limit), p, allowed, 1, monkeypatch
        )
        torch.testing.assert_close(found, p * torch.tensor(allowed), atol=1e-12, rtol=0)


def test_the_first_pass_alone_would_be_biased(monkeypatch: pytest.MonkeyPatch) -> None:
    """The enumeration notices the mistake that the paper warns of."""

    def one_pass(log_p: Tensor, accept: awrs.Accept, generator: torch.Generator | None) -> awrs.TokenDraw:
        rejected = 0.0
        for token in awrs.without_replacement(log_p.exp().numpy(), generator):
            if accept(token):
                return awrs.TokenDraw(token, math.log(1 - rejected), 1)
            rejected += float(log_p[token].exp())
        return awrs.TokenDraw(None, -math.inf, 1)

    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    found = enumerate_weights(one_pass, p, [True, False, False, True], 1, monkeypatch)
    assert float(found.sum()) > 0.5 + 0.01


@pytest.mark.parametrize(
    ("accepts", "rejects"), [(2, math.inf), (3, math.inf), (5, math.inf), (2, 2), (3, 3), (2, 5), (5, 4)]
)
def test_geometric_weights_are_unbiased(accepts: int, rejects: float) -> None:
    generator = torch.Generator().manual_seed(0)
    log_p = torch.tensor([0.5, 0.2, 0.1, 0.2]).log() + math.log(0.7)  # need not be normalised
    weights = []
    for _ in range(2500):
        drawn = geometric(log_p, lambda token: token in (1, 2), generator, accepts, rejects)
        weights.append(math.exp(drawn.log_weight))
    found = torch.tensor(weights)
    assert abs(float(found.mean()) - 0.7 * 0.3) <= 4 * float(found.std()) / math.sqrt(len(found))


def test_more_acceptances_lower_the_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    log_p = torch.tensor([0.4, 0.2, 0.2, 0.2]).log()

    def spread(accepts: int) -> float:
        drawn = [geometric(log_p, lambda t: t == 1, generator, accepts) for _ in range(1500)]
        return float(torch.tensor([math.exp(d.log_weight) for d in drawn]).std())

    assert spread(4) < 0.75 * spread(2)


def test_drawing_without_replacement_follows_plackett_and_luce() -> None:
    p = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    counts = Counter(tuple(awrs.without_replacement(p.numpy(), generator)) for _ in range(6000))
    exact = dict(orders(p))
    fit = goodness_of_fit([counts[order] for order in exact], list(exact.values()), effect=0.06)
    assert fit.passed, fit
    assert fit.power > 0.9


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("proposal", "greedy", "geometric")])
def test_the_token_follows_the_masked_distribution(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.06, 0.04])
    allowed = torch.tensor([0, 1, 0, 1, 1, 0])
    draws = Counter(SAMPLERS[name](p.log(), lambda t: bool(allowed[t]), generator).token for _ in range(3000))
    if name == "awrs":  # a dead end of the weight cannot be: some token is always allowed
        assert None not in draws
    fit = goodness_of_fit([draws[t] for t in range(6)], (p * allowed / (p * allowed).sum()).tolist(), effect=0.06)
    assert fit.passed, fit
    assert fit.power > 0.9


@pytest.mark.parametrize("name", ["awrs", "two-pass", "recursive", "geometric", "local", "greedy"])
def test_no_token_is_checked_twice(name: str) -> None:
    for seed in range(40):
        generator, asked = torch.Generator().manual_seed(seed), Counter[int]()

        def accept(token: int, asked: Counter[int] = asked) -> bool:
            asked[token] += 1
            return token > 5

        drawn = SAMPLERS[name](torch.zeros(40).log_softmax(0), accept, generator)
        assert drawn.checks == len(asked) == sum(asked.values())


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "rejection"])  # it gives up at a million
def test_nothing_is_allowed(name: str) -> None:
    drawn = SAMPLERS[name](torch.randn(30), lambda token: False, torch.Generator().manual_seed(0))
    assert drawn.token is None
    assert drawn.log_weight == -math.inf
    assert drawn.checks <= 30


@pytest.mark.parametrize("name", ["two-pass", "awrs", "recursive", "local", "greedy", "masked"])
def test_one_unlikely_token_is_found(name: str) -> None:
    """Also where the model gives it next to nothing."""
    log_p = torch.full((100,), -30.0)
    log_p[3], log_p[77] = 0.0, -18.0
    drawn = SAMPLERS[name](log_p.log_softmax(0), lambda token: token == 77, torch.Generator().manual_seed(0))
    assert drawn.token == 77
    assert drawn.rejected == 3


def test_everything_is_allowed() -> None:
    for seed in range(20):
        drawn = two_pass(torch.randn(50).log_softmax(0), lambda token: True, torch.Generator().manual_seed(seed))
        assert abs(drawn.log_weight) < 1e-6
        assert drawn.checks <= 2
        assert drawn.rejected is None


def test_checks_are_few() -> None:
    """Not more than plain rejection needs, and next to none where the model mostly proposes what is allowed."""
    p = torch.softmax(torch.randn(2000, generator=torch.Generator().manual_seed(0)), 0)
    order = p.argsort(descending=True)
    for share, bound in ((0.9, 3.0), (0.3, 1 + 2 / 0.3)):
        refused = set(order[p[order].cumsum(0) <= 1 - share].tolist())
        generator = torch.Generator().manual_seed(1)
        for name in ("two-pass", "recursive"):
            draw = partial(SAMPLERS[name], p.log(), lambda t, refused=refused: t not in refused, generator)
            counts = [draw().checks for _ in range(300)]
            assert sum(counts) / len(counts) < bound


@pytest.mark.parametrize("name", PROPER)
def test_a_pruned_vocabulary_changes_nothing_in_the_mean(name: str) -> None:
    """Tokens known to be impossible leave with their mass, which the weight remembers."""
    generator = torch.Generator().manual_seed(3)
    log_p = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    log_p[0] = -torch.inf
    drawn = [SAMPLERS[name](log_p, lambda t: t in (1, 3), generator) for _ in range(3000)]
    weights = torch.tensor([math.exp(d.log_weight) for d in drawn])
    assert abs(float(weights.mean()) - 0.4) <= 4 * float(weights.std()) / math.sqrt(len(weights)) + 1e-6
    assert all(d.token in (1, 3, None) for d in drawn)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seed_draws_the_same(name: str) -> None:
    log_p = torch.randn(60, generator=torch.Generator().manual_seed(5)).log_softmax(0)
    one, other = (SAMPLERS[name](log_p, lambda t: t % 3 > 0, torch.Generator().manual_seed(9)) for _ in range(2))
    assert one == other


def test_misuse() -> None:
    with pytest.raises(InputError, match="max_accepts: 1 is not at least 2"):
        geometric(torch.zeros(3), lambda t: True, max_accepts=1)
    with pytest.raises(InputError, match="max_rejects: 1 is not at least 2"):
        recursive(torch.zeros(3), lambda t: True, max_rejects=1)
    with pytest.raises(InputError, match="sampler: no 'gumbel'"):
        sampler("gumbel")
    with pytest.raises(NumericalError, match="log_p: no finite entry"):
        two_pass(torch.full((3,), -torch.inf), lambda t: True)
