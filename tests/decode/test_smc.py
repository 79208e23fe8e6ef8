"""SMC: the posterior over whole texts, where deciding token by token goes astray."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import pytest
import torch
from transformers import PreTrainedModel

from tokenworks.core.corpus import train_bpe
from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Session
from tokenworks.decode.awrs import SAMPLERS
from tokenworks.decode.constraint import regex
from tokenworks.decode.smc import SMC, Posterior
from tokenworks.testing import ToyTarget

STOP, LIMIT = 2, 4


class OneOf:
    """Texts of a list, as token ids."""

    def __init__(self, texts: Iterable[tuple[int, ...]], written: tuple[int, ...] = ()) -> None:
        self.texts, self.written = list(texts), written

    @property
    def complete(self) -> bool:
        return self.written in self.texts

    def allows(self, token: int) -> bool:
        begun = (*self.written, token)
        return any(text[: len(begun)] == begun for text in self.texts)

    def after(self, token: int) -> OneOf:
        return OneOf(self.texts, (*self.written, token))


# After 0 much may follow, after 1 only one long text: whoever chooses 1 is led into a corner.
ALLOWED = OneOf([(0,), (0, 0), (0, 1, 0), (1, 1, 1, 1), (1, 1, 1, 0)])


def toy() -> ToyTarget:
    target = ToyTarget(seed=4)
    target.table[0] = torch.tensor([0.2, 1.0, 0.0])
    target.table[1] = torch.tensor([1.0, -1.0, 0.5])
    return target


def enumerated(target: ToyTarget, constraint: OneOf, local: bool) -> dict[tuple[int, ...], float]:
    """Probability of every allowed text; with `local`, when each token is drawn from what is allowed there."""
    step, found = torch.softmax(target.table.double(), -1), {}
    for text in constraint.texts:
        probability, here, before = 1.0, constraint, 0
        for token in (*text, STOP):
            row = step[before]
            if local:
                free = [here.complete if t == STOP else here.allows(t) for t in range(3)]
                row = row * torch.tensor(free) / (row * torch.tensor(free)).sum()
            probability, before = probability * float(row[token]), token
            here = here.after(token)
        found[text] = probability
    return found


def distance(one: dict[tuple[int, ...], float], other: dict[tuple[int, ...], float]) -> float:
    return sum(abs(one.get(text, 0.0) - other.get(text, 0.0)) for text in {*one, *other}) / 2


def posterior(name: str, particles: int, threshold: float = 0.5, seed: int = 0) -> Posterior:
    smc = SMC(toy(), SAMPLERS[name], particles, threshold)
    return smc.generate([0], ALLOWED, LIMIT, [STOP], seed)


def conditional() -> tuple[dict[tuple[int, ...], float], float]:
    joint = enumerated(toy(), ALLOWED, local=False)
    total = sum(joint.values())
    return {text: p / total for text, p in joint.items()}, total


@pytest.mark.parametrize("name", ["awrs", "two-pass", "recursive", "geometric", "masked", "proposal"])
def test_many_particles_follow_the_conditional(name: str) -> None:
    exact, total = conditional()
    found = posterior(name, 2500)
    assert distance(found.probabilities, exact) < 0.06
    assert math.exp(found.log_evidence) == pytest.approx(total, rel=0.15)


@pytest.mark.parametrize("name", ["local"])
def test_local_decoding_converges_elsewhere(name: str) -> None:
    """To its own distribution, which can be computed, and is not the conditional one."""
    exact, _ = conditional()
    elsewhere = enumerated(toy(), ALLOWED, local=True)
    found = posterior(name, 2500).probabilities
    assert distance(elsewhere, exact) > 0.2
    assert distance(found, elsewhere) < 0.05
    assert distance(found, exact) > 0.15


@pytest.mark.parametrize(("particles", "threshold"), [(1, 0.0), (2, 0.5), (3, 1.0)])
@pytest.mark.parametrize("name", ["awrs", "two-pass"])
def test_the_mean_weight_is_the_probability_of_being_allowed(name: str, particles: int, threshold: float) -> None:
    _, total = conditional()
    found = [math.exp(posterior(name, particles, threshold, seed).log_evidence) for seed in range(700)]
    weights = torch.tensor(found)
    assert abs(float(weights.mean()) - total) <= 4 * float(weights.std()) / math.sqrt(len(weights))


def test_a_critic_counts_once_at_the_end() -> None:
    """Its potentials on the way steer only: the target is p times that of the whole text."""

    def critic(tokens: tuple[int, ...]) -> float:
        return 0.7 * sum(token == 1 for token in tokens)

    joint = {t: p * math.exp(critic(t)) for t, p in enumerated(toy(), ALLOWED, local=False).items()}
    total = sum(joint.values())
    smc = SMC(toy(), SAMPLERS["masked"], 2500, critic=critic)
    found = smc.generate([0], ALLOWED, LIMIT, [STOP], seed=0)
    assert distance(found.probabilities, {t: p / total for t, p in joint.items()}) < 0.06


def test_particles_in_one_tree_are_what_they_would_be_alone(tiny_llama: PreTrainedModel) -> None:
    """Every token's probability, after any number of resamplings, is that of a pass over the text itself."""
    session = Session(tiny_llama)
    allowed = OneOf(itertools.product(range(8), (3, 5, 7), range(8), (2, 4, 6)))
    prompt = [11, 12, 13]
    found = SMC(session, particles=6, ess_threshold=1.0).generate(prompt, allowed, 8, [STOP + 88], seed=3)
    assert len(found.resampled) >= 2
    alive = [p for p in found.particles if p.log_weight > -math.inf]
    assert len({p.tokens for p in alive}) > 1
    for particle in alive:
        ids = torch.tensor([prompt + list(particle.tokens)])
        rows = torch.log_softmax(tiny_llama(ids).logits[0, len(prompt) - 1 : -1], -1)
        own = rows[torch.arange(len(particle.tokens)), torch.tensor(particle.tokens)].exp()
        torch.testing.assert_close(
            own, torch.tensor([s.probability for s in particle.steps]), atol=1e-5, rtol=1e-3
        )


def test_a_session_is_left_clean_and_greedy_repeats_itself(tiny_llama: PreTrainedModel) -> None:
    session = Session(tiny_llama)
    allowed = OneOf(itertools.product(range(40), repeat=2))
    smc = SMC(session, particles=1, sampling=Sampling(0.0))
    one = smc.generate([1, 2], allowed, 8, [90])
    assert session.pending == 0
    assert one.best.tokens == smc.generate([1, 2], allowed, 8, [90]).best.tokens
    rows = torch.log_softmax(tiny_llama(torch.tensor([[1, 2]])).logits[0, -1], -1)
    assert one.best.tokens[0] == int(rows[:40].argmax())


def test_nothing_found_is_an_empty_posterior() -> None:
    nothing = SMC(toy(), particles=3).generate([0], OneOf([(1, 1, 1, 1, 1, 1)]), 3, [STOP], seed=0)
    assert nothing.probabilities == {}
    assert nothing.log_evidence == -math.inf
    with pytest.raises(InputError, match="constraint: no text that satisfies it was found; all 3 particles died"):
        _ = nothing.best


def test_the_trace_shows_what_was_refused(tiny_llama: PreTrainedModel) -> None:
    tokenizer = train_bpe(["nothing to merge"], 257, special=["<end>"])
    tokenizer.eos_token = "<end>"
    session = Session(tiny_llama)
    # The tiny model knows 97 ids: the first bytes of the alphabet.
    found = SMC(session, particles=3).generate([1, 2], regex("[0-9A-F]{3}", tokenizer), 8, [0], seed=0)
    trace = found.trace(tokenizer)
    assert "".join(trace.tokens[:3]).isalnum()
    assert set(trace.channels) == {"forced", "probability", "checks", "wanted", "particles"}
    assert trace.channels["forced"].values[0] >= 0
    assert any(trace.channels["wanted"].values)
    assert trace.meta["checks"] == found.checks > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"particles": 0}, "particles: 0 is not at least 1"),
        ({"ess_threshold": 1.5}, "ess_threshold: 1.5 is not between 0 and 1"),
        ({"sampling": Sampling(0.0)}, "particles: 5 greedy ones would all be the same"),
    ],
)
def test_misuse(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        SMC(toy(), **arguments)  # type: ignore[arg-type]


def test_misuse_of_generate() -> None:
    with pytest.raises(InputError, match="stop_ids: empty"):
        SMC(toy()).generate([0], ALLOWED, 4)
    with pytest.raises(InputError, match="max_new_tokens: 0"):
        SMC(toy()).generate([0], ALLOWED, 0, [STOP])
