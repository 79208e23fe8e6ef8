"""Terms over the vocabulary: values and gradients against autograd on the whole logits, in any chunking."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conftest import CONFIGS, tiny_model
from tokenworks.align import vocabulary
from tokenworks.align.vocabulary import Direction, Head, check_head, vocabulary_terms
from tokenworks.core.errors import UnsupportedModelError

TOKENS, WIDTH, WORDS = 11, 5, 13


def tensors(seed: int, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((TOKENS, WIDTH), (WORDS, WIDTH), (WORDS,))
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float32).requires_grad_(grad) for shape in shapes
    )
    return hidden, weight, bias


def plainly(
    ours: tuple[Tensor, Tensor, Tensor],
    softcap: float,
    theirs: tuple[Tensor, Tensor, Tensor],
    labels: Tensor,
    direction: Direction | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """log p of the labels, divergence and entropy, from all logits at once."""
    logits = ours[0] @ ours[1].T + ours[2]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = logits.log_softmax(-1)
    log_t = (theirs[0] @ theirs[1].T + theirs[2]).log_softmax(-1)
    divergence = torch.zeros(TOKENS)
    if direction == "forward":
        divergence = torch.nn.functional.kl_div(log_p, log_t, reduction="none", log_target=True).sum(-1)
    elif direction == "reverse":
        divergence = torch.nn.functional.kl_div(log_t, log_p, reduction="none", log_target=True).sum(-1)
    return log_p[torch.arange(TOKENS), labels], divergence, -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("direction", [None, "forward", "reverse"])
@pytest.mark.parametrize("softcap", [0.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_values_and_gradients_are_those_of_autograd(
    direction: Direction | None, softcap: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK", chunk)
    theirs, labels = tensors(1, grad=False), torch.arange(TOKENS) % WORDS
    weights = torch.randn(2, TOKENS, generator=torch.Generator().manual_seed(2))
    teacher = Head(theirs[1], theirs[2]).teacher(theirs[0]) if direction else None
    results = []
    for chunked in (True, False):
        ours = tensors(0, grad=True)
        if chunked:
            terms = vocabulary_terms(Head(ours[1], ours[2], softcap), ours[0], labels, teacher, direction)
            log_p, divergence, entropy = terms.log_p, terms.divergence, terms.entropy
        else:
            log_p, divergence, entropy = plainly(ours, softcap, theirs, labels, direction)
        ((weights[0] * log_p).sum() + (weights[1] * divergence).sum()).backward()
        results.append([log_p, divergence, entropy.detach(), *(x.grad for x in ours)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)


def test_the_directions_differ_and_the_teacher_says_its_own() -> None:
    ours, theirs, labels = tensors(0, False), tensors(1, False), torch.arange(TOKENS)
    teacher = Head(*theirs[1:]).teacher(theirs[0])
    found = [vocabulary_terms(Head(*ours[1:]), ours[0], labels, teacher, d) for d in ("forward", "reverse")]  # type: ignore[arg-type]
    assert not torch.allclose(found[0].divergence, found[1].divergence, atol=0.1)
    taught = vocabulary_terms(Head(*theirs[1:]), theirs[0], labels).log_p
    torch.testing.assert_close(found[0].teacher_log_p, taught)


def test_underflow_is_no_nan() -> None:
    """Logits so far apart that most probabilities are 0 in float32."""
    hidden, weight = torch.eye(3)[:1] * 1e4, torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    hidden.requires_grad_(True)
    terms = vocabulary_terms(Head(weight), hidden, torch.tensor([0]), Head(-weight).teacher(hidden), "forward")
    assert torch.isfinite(terms.divergence).all()
    (terms.log_p + terms.divergence).sum().backward()
    assert torch.isfinite(hidden.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_the_head_of_every_architecture_is_followed(kind: str) -> None:
    model = tiny_model(kind, **({"final_logit_softcapping": 3.0} if kind == "gemma2" else {}))
    check_head(model)


def test_a_head_that_does_more_is_refused() -> None:
    model = tiny_model("llama")
    plain = type(model).forward

    class Scaled(type(model)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            found = plain(self, *args, **kwargs)
            found.logits = found.logits * 0.5
            return found

    model.__class__ = Scaled
    with pytest.raises(UnsupportedModelError, match="not its head's product"):
        check_head(model)
