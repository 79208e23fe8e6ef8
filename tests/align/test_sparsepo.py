"""SparsePO: gradients to logits and masks in closed form, and what a learned mask may look at."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tests.align.made_up import LAYERS, WIDTH, loss_and_gradients, random_pairs, widened
from tests.conftest import tiny_model
from tokenworks.align.contract import Pairs
from tokenworks.align.reading import EncodedPair, collate, read_pairs
from tokenworks.align.sparsepo import INNER, KINDS, SparsePO, SparseTokenMask
from tokenworks.align.tdpo import TDPO
from tokenworks.core.errors import InputError

BETA = 0.3


class Given(SparsePO):
    """Masks that are handed over, so that gradients to them can be looked at."""

    def __init__(self, m_u: Tensor, m_d: Tensor, l1_u: float = 0.0, l1_d: float = 0.0, beta: float = BETA) -> None:
        super().__init__("scores", beta=beta, l1_u=l1_u, l1_d=l1_d)
        self.given = m_u, m_d

    def masks(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        m_u, m_d = (torch.where(pairs.mask, mask, 0.0) for mask in self.given)
        return m_u, m_d


def learned(mask: str = "independent", **options: object) -> SparsePO:
    torch.manual_seed(3)
    settings: dict[str, Any] = {"beta": BETA, "dropout": 0.0} | options
    return SparsePO(mask, LAYERS, WIDTH, **settings).double()


def random_masks(pairs: Pairs) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    m_u, m_d = (
        torch.rand(pairs.mask.shape, generator=random, dtype=torch.float64).requires_grad_(True) for _ in range(2)
    )
    return m_u, m_d


def test_the_loss_is_the_papers() -> None:
    pairs = random_pairs()
    m_u, m_d = random_masks(pairs)
    outcome = Given(m_u, m_d, 0.01, 0.02)(pairs)
    inside = pairs.mask.double()
    u_w, u_l = (m_u * pairs.log_ratio).sum(1).chunk(2)
    d_w, d_l = (m_d * pairs.divergence * inside).sum(1).chunk(2)
    norms = [(mask * inside).sum(1).chunk(2) for mask in (m_u, m_d)]
    expected = -logsigmoid(BETA * (u_w - u_l - (d_l - d_w))) + 0.01 * sum(norms[0]) + 0.02 * sum(norms[1])
    torch.testing.assert_close(outcome.loss, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(outcome.rewards, BETA * torch.cat([u_w + d_w, u_l + d_l]).detach())
    for name, values in outcome.channels.items():
        assert not values.requires_grad
        assert (values[~pairs.mask] == 0).all()
        assert outcome.descriptions[name]


def test_masks_that_are_a_number_scale_beta() -> None:
    pairs = random_pairs()
    mask = torch.full(pairs.mask.shape, 0.4, dtype=torch.float64)
    ours, theirs = (loss_and_gradients(m, pairs) for m in (Given(mask, mask), TDPO(0.4 * BETA, variant="tdpo1")))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_learning_begins_at_tdpo1_if_masks_begin_as_ones() -> None:
    pairs = random_pairs()
    theirs = loss_and_gradients(TDPO(BETA, variant="tdpo1"), pairs)
    for method in (learned(init="ones"), learned("common", init="ones", mixer="mean")):
        for one, other in zip(loss_and_gradients(method, pairs), theirs, strict=True):
            torch.testing.assert_close(one, other)


def test_a_dead_mask_is_noticed_and_teaches_nothing() -> None:
    pairs = random_pairs()
    method = learned("common")
    with torch.no_grad():
        method.mask_u.mixer.copy_(-method.mask_u.mixer.abs())  # type: ignore[union-attr, operator]
    with pytest.warns(UserWarning, match="the reward mask is 0 at every token"):
        loss, to_log_p, to_divergence = loss_and_gradients(method, pairs)
    assert loss.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-15)
    assert to_log_p.abs().max() == 0
    assert to_divergence.abs().max() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learned(init="ones")(pairs)


@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_masks_do_not_move_before_the_policy_has(weight: float) -> None:
    """At the reference their only gradient is that of the L1 term."""
    pairs = random_pairs(equal=True)
    m_u, m_d = random_masks(pairs)
    method = Given(m_u, m_d, weight, 2 * weight)
    loss = method(pairs).loss
    sums = [sum((mask * pairs.mask).sum(1).chunk(2)) for mask in (m_u, m_d)]
    torch.testing.assert_close(loss, math.log(2) + weight * sums[0] + 2 * weight * sums[1])
    to_u, to_d = torch.autograd.grad(loss.sum(), (m_u, m_d))
    torch.testing.assert_close(to_u, weight * pairs.mask.double())
    torch.testing.assert_close(to_d, 2 * weight * pairs.mask.double())
    heads = learned()
    heads(pairs).loss.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in heads.parameters())


def test_the_identity_with_a_mask_and_its_optimum() -> None:
    """A = beta m (log ratio + KL), E_ref[A] = 0; no policy is better at E[A] - beta m KL(policy || reference)."""
    random = torch.Generator().manual_seed(0)
    reference, q = (torch.randn(8, generator=random, dtype=torch.float64) for _ in range(2))
    reference = reference.log_softmax(-1)
    for m in (0.2, 1.0, 1.7):
        best = (reference + q / (BETA * m)).log_softmax(-1)
        advantage = q - (reference.exp() * q).sum()
        divergence = (reference.exp() * (reference - best)).sum()
        torch.testing.assert_close(advantage, BETA * m * (best - reference + divergence), atol=1e-12, rtol=0)
        pairs = Pairs(best[None].repeat(2, 1), reference[None].repeat(2, 1), torch.ones(2, 8, dtype=torch.bool),
                      divergence.expand(2, 8))  # fmt: skip
        mask = torch.full((2, 8), m, dtype=torch.float64)
        rewards = Given(mask, mask)(pairs).channels["reward"][0]
        torch.testing.assert_close(rewards, advantage, atol=1e-12, rtol=0)
        assert float((reference.exp() * rewards).sum()) == pytest.approx(0, abs=1e-12)
        others = (best + torch.randn(5000, 8, generator=random, dtype=torch.float64)).log_softmax(-1)

        def value(log: Tensor, m: float = m, advantage: Tensor = advantage) -> Tensor:
            return (log.exp() * (advantage - BETA * m * (log - reference))).sum(-1)

        assert (value(others) < value(best)).all()


def test_learned_masks_are_0_or_more_and_sometimes_0() -> None:
    pairs = random_pairs(pairs=40)
    method = learned()
    m_u, m_d = method.masks(pairs)
    assert not torch.equal(m_u, m_d)
    metrics = method(pairs).metrics
    chosen, rejected = pairs.mask.chunk(2)
    for name, mask in (("reward", m_u), ("divergence", m_d)):
        assert (mask >= 0).all()
        assert (mask[~pairs.mask] == 0).all()
        zero = mask[pairs.mask] == 0
        assert 0 < float(zero.double().mean()) < 1
        assert metrics[f"sparsity/{name}"] == pytest.approx(float(zero.double().mean()))
        for side, inside, half in zip(("chosen", "rejected"), (chosen, rejected), mask.chunk(2), strict=True):
            assert metrics[f"sparsity/{name}/{side}"] == pytest.approx(float((half[inside] == 0).double().mean()))


def test_a_mask_is_the_mix_of_its_heads() -> None:
    """By loops over layers, from one LayerNorm that they share."""
    torch.manual_seed(0)
    for mixer in ("learned", "mean"):
        mask = SparseTokenMask(LAYERS, WIDTH, dropout=0.0, mixer=mixer)
        with torch.no_grad():
            mask.bias.normal_()
            mask.norm.weight.normal_()
        states = torch.randn(4, LAYERS, WIDTH)
        total = torch.zeros(4)
        for layer in range(LAYERS):
            normed = mask.norm(states[:, layer])
            total += mask.mixer[layer] * torch.relu(normed @ mask.weight[layer] + mask.bias[layer])
        torch.testing.assert_close(mask(states), torch.relu(total))
    assert mask.mixer.tolist() == pytest.approx([1 / LAYERS] * LAYERS)
    assert not mask.mixer.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_by_loops(kind: str) -> None:
    """Heads of one or two layers on all layers or the last; binary ones say only whether a token counts."""
    torch.manual_seed(0)
    mask = SparseTokenMask(LAYERS, WIDTH, dropout=0.0, kind=kind).double()
    with torch.no_grad():
        for parameter in mask.parameters():
            parameter.normal_()
        if not kind.endswith("_last"):
            mask.mixer.copy_(torch.tensor([0.8, -0.6, 0.4]))  # of both signs
    states = torch.randn(30, LAYERS, WIDTH, dtype=torch.float64)
    last = kind.endswith("_last")
    heads = []
    for place, layer in enumerate([LAYERS - 1] if last else range(LAYERS)):
        used = states[:, layer] if last else mask.norm(states[:, layer])
        if kind.startswith("ml"):
            used = used @ mask.inner[place].T + mask.inner_bias[place]  # type: ignore[index]
        heads.append(torch.relu(used @ mask.weight[place] + mask.bias[place]))
    mixed = heads[0] if last else torch.relu(sum(v * head for v, head in zip(mask.mixer, heads, strict=True)))
    binary = kind.startswith("binary")
    found = mask(states)
    torch.testing.assert_close(found, torch.sign(mixed) if binary else mixed)
    assert found.any()
    (to_weight,) = torch.autograd.grad(found.sum(), mask.weight)
    assert bool(to_weight.any()) != binary, "a sign passes no gradient on"
    ones = SparseTokenMask(LAYERS, WIDTH, init="ones", dropout=0.0, kind=kind).double()
    torch.testing.assert_close(ones(states), torch.ones_like(found))


def test_parameters_of_heads_on_the_last_layer() -> None:
    """d + 1, and nothing to mix or normalise."""
    sizes = {
        kind: sum(p.numel() for p in SparseTokenMask(LAYERS, WIDTH, kind=kind).parameters())
        for kind in ("simple_last", "binary_last", "ml_last")
    }
    assert sizes == {
        "simple_last": WIDTH + 1, "binary_last": WIDTH + 1, "ml_last": INNER * (WIDTH + 1) + INNER + 1,
    }  # fmt: skip


def test_a_learned_mask_is_causal() -> None:
    """Another token, or another one after it, leaves the mask at its place as it is; the next place sees it."""
    reference = tiny_model("llama", seed=1)
    torch.manual_seed(0)
    method = SparsePO("common", 3, 32, init="ones", dropout=0.0)
    with torch.no_grad():
        method.mask_u.weight.normal_(std=0.1)  # type: ignore[union-attr, operator]
    plain, changed = ([4, 5, 6, 7], [4, 5, 60, 7])
    found = []
    for response in (plain, changed):
        batch = collate([EncodedPair([1, 2, 3], response, [8, 9])])
        mask, _ = method.masks(read_pairs(reference, reference, batch, method.needs))
        found.append(mask[0][batch.mask[0]].detach())
    torch.testing.assert_close(found[0][:3], found[1][:3])
    assert abs(float(found[0][3] - found[1][3])) > 1e-3


def test_tokens_with_mask_0_have_no_gradient() -> None:
    pairs = random_pairs()
    m_u, m_d = (mask.detach().clone() for mask in random_masks(pairs))
    left_out = pairs.mask & (torch.arange(6) % 2 == 0)
    m_u[left_out] = 0
    m_d[left_out] = 0
    _, to_log_p, to_divergence = loss_and_gradients(Given(m_u, m_d), pairs)
    for gradient in (to_log_p, to_divergence):
        assert gradient[left_out].abs().max() == 0
        assert (gradient[pairs.mask & ~left_out] != 0).all()


def test_gradients_to_masks_in_closed_form() -> None:
    """With g = beta sigmoid(-margin): -g l and g l to m_u, -g K and g K to m_d, and lambda besides."""
    pairs = random_pairs()
    masks = random_masks(pairs)
    plain = Given(*masks)(pairs).loss.detach()
    g = (BETA * (1 - torch.exp(-plain)))[:, None]
    sign = torch.cat([-g, g]) * pairs.mask
    to_u, to_d = torch.autograd.grad(Given(*masks, 0.01, 0.02)(pairs).loss.sum(), masks)
    inside = pairs.mask.double()
    torch.testing.assert_close(to_u, sign * pairs.log_ratio.detach() + 0.01 * inside)
    torch.testing.assert_close(to_d, sign * pairs.divergence.detach() + 0.02 * inside)  # type: ignore[union-attr]
    _, unregularised = torch.autograd.grad(Given(*masks)(pairs).loss.sum(), masks)
    chosen, rejected = pairs.mask.chunk(2)
    assert (unregularised[:3][chosen] < 0).all(), "descent raises m_d on chosen tokens"
    assert (unregularised[3:][rejected] > 0).all(), "and lowers it on rejected ones"


def test_padding_and_batching_are_nothing() -> None:
    pairs = random_pairs()
    method = learned(init="ones", l1_u=0.1, l1_d=0.1)
    together = method(pairs).loss
    torch.testing.assert_close(method(widened(pairs, 2, 2)).loss, together, atol=1e-12, rtol=0)
    alone = Pairs(*(getattr(pairs, n)[[1, 4]] for n in Pairs.__dataclass_fields__))
    torch.testing.assert_close(method(alone).loss, together[[1]], atol=1e-12, rtol=0)


def test_one_mask_or_two_and_their_parameters() -> None:
    """L (d + 1) of the heads, L of the mixer, 2 d of the LayerNorm; states get no gradient."""
    size = LAYERS * (WIDTH + 1) + LAYERS + 2 * WIDTH
    pairs = random_pairs()
    pairs.states.requires_grad_(True)  # type: ignore[union-attr]
    for mask, count in (("common", 1), ("independent", 2)):
        method = learned(mask, init="ones")
        assert sum(p.numel() for p in method.parameters()) == count * size
        m_u, m_d = method.masks(pairs)
        assert (m_u is m_d) == (mask == "common")
        method(pairs).loss.sum().backward()
        assert all(p.grad is not None for p in method.parameters())
        assert pairs.states.grad is None  # type: ignore[union-attr]
    assert not list(SparsePO("scores").parameters())


def test_a_larger_penalty_makes_masks_sparser() -> None:
    """In the mean over five seeds, on pairs that do not move."""
    shares = []
    for weight in (0.0, 0.1, 1.0):
        found = []
        for seed in range(5):
            torch.manual_seed(seed)
            pairs = random_pairs(seed, pairs=8)
            method = SparsePO("common", LAYERS, WIDTH, 1.0, weight, weight, "ones", 0.0).double()
            with torch.no_grad():
                method.mask_u.weight.normal_(std=0.5)  # type: ignore[union-attr, operator]
            optimizer = torch.optim.Adam(method.parameters(), 0.05)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # masks may die
                for _ in range(25):
                    optimizer.zero_grad()
                    method(pairs).loss.mean().backward()
                    optimizer.step()
                found.append(method(pairs).metrics["sparsity/reward"])
        shares.append(sum(found) / 5)
    assert shares[0] <= shares[1] <= shares[2]
    assert shares[0] < shares[2]


def test_dropout_is_of_training_alone() -> None:
    torch.manual_seed(0)
    mask = SparseTokenMask(LAYERS, WIDTH, init="ones", dropout=0.5)
    states = torch.randn(200, LAYERS, WIDTH)
    assert (mask(states) == 0).any()
    assert (mask.eval()(states) == 1).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mask": "both"}, "mask: no 'both'; there are common, independent, scores"),
        ({"layers": 0}, "layers, hidden_size: a learned mask needs the reference's"),
        ({"beta": 0.0}, "beta: 0.0 is not a number above 0"),
        ({"l1_u": -1.0}, "l1_u: -1.0 is not a number from 0 upwards"),
        ({"init": "zeros"}, "init: no 'zeros'; there are paper, ones"),
        ({"mixer": "max"}, "mixer: no 'max'; there are learned, mean"),
        ({"kind": "double"}, "kind: no 'double'; there are simple_all, simple_last, ml_all"),
        ({"dropout": 1.0}, r"dropout: 1.0 is not in \[0, 1\)"),
    ],
)
def test_misuse(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        SparsePO(**({"mask": "common", "layers": LAYERS, "hidden_size": WIDTH} | arguments))


def test_what_pairs_must_bring() -> None:
    pairs = random_pairs()
    with pytest.raises(InputError, match="scores: a negative mask"):
        SparsePO("scores")(pairs)
    for name, method in (("scores", SparsePO("scores")), ("states", learned()), ("divergence", learned())):
        with pytest.raises(InputError, match=f"pairs: the method needs `{name}`"):
            method(replace(pairs, **{name: None}))
