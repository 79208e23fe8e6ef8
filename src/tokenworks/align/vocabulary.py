"""What a loss needs of the whole vocabulary at each token, without ever holding the logits of all tokens.

    terms = vocabulary_terms(head, hidden, labels)                        # log-probabilities and entropies
    terms = vocabulary_terms(head, hidden, labels, reference, "forward")  # and KL(reference || policy)

The logits of a batch are its largest tensor by far: 512 tokens of SmolLM2 take 100 MB, and a divergence wants
several of that size. Here they exist for a few hundred tokens at a time, and are computed again on the way back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tokenworks.core.errors import UnsupportedModelError

CHUNK = 128
"""Tokens whose logits exist at a time."""

Direction = Literal["forward", "reverse"]
"""Of a divergence from the policy p to a teacher t: KL(t || p), or KL(p || t)."""

Teacher = Callable[[slice], Tensor]
"""Log-probabilities [n, V] of the teacher at a stretch of the tokens; without gradient."""


@dataclass(frozen=True)
class Head:
    """The map from a state to logits: float [..., d] to [..., V].

    Attributes:
        weight: float [V, d]; bias: float [V] or None.
        softcap: logits l become softcap tanh(l / softcap), as in Gemma 2; 0 leaves them.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float = 0.0

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """The head of a causal language model of Transformers; its weight may be gathered anew at each call."""
        own: Any = model
        layer = own.get_output_embeddings()
        return cls(
            layer.weight, layer.bias, getattr(own.config.get_text_config(), "final_logit_softcapping", 0) or 0
        )

    @classmethod
    def lasting(cls, model: nn.Module) -> Head:
        """The head, to be used after the model's `forward`, in which this is called, has ended: FSDP then takes a
        whole weight away again, so that there it is copied."""
        head = cls.of(model)
        # Beneath an adapter, only the layers show that the whole is sharded.
        if not any(isinstance(part, FSDPModule) for part in model.modules()):
            return head
        return replace(
            head,
            weight=head.weight.detach().clone(),
            bias=None if head.bias is None else head.bias.detach().clone(),
        )

    def log_probs(self, hidden: Tensor) -> Tensor:
        """float32 [n, V] of states [n, d]."""
        return torch.log_softmax(_logits(hidden, self.weight, self.bias, self.softcap), -1)

    def teacher(self, hidden: Tensor) -> Teacher:
        """This head over states [N, d] as a teacher, without gradient."""
        frozen = hidden.detach()

        @torch.no_grad()
        def log_probs(part: slice) -> Tensor:
            return self.log_probs(frozen[part])

        return log_probs


class Terms(NamedTuple):
    """Per token.

    Attributes:
        log_p: float32 [N], of the label under the policy; has a gradient.
        divergence: float32 [N], between teacher and policy, zero if none was asked for; has a gradient.
        entropy: float32 [N], of the policy, in nats; no gradient.
        teacher_log_p: float32 [N], of the label under the teacher, zero without one; no gradient.
    """

    log_p: Tensor
    divergence: Tensor
    entropy: Tensor
    teacher_log_p: Tensor


def vocabulary_terms(
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    teacher: Teacher | None = None,
    direction: Direction | None = None,
) -> Terms:
    """Log-probabilities of `labels`, and a divergence to a teacher over the whole vocabulary.

    Args:
        head: of the policy.
        hidden: float [N, d], states of the policy from which the labels are predicted.
        labels: int64 [N].
        teacher: see `Teacher`; asked again on the way back.
        direction: of the divergence; None leaves it out.
    """
    return Terms(*_VocabularyTerms.apply(hidden, head.weight, head.bias, head.softcap, labels, teacher, direction))


class _VocabularyTerms(torch.autograd.Function):
    """With p = softmax(z) and t the teacher, per token:

    d log p(y) / dz = 1_y - p,   d KL(t || p) / dz = p - t,   d KL(p || t) / dz = p (log p - log t - KL(p || t)).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float,
        labels: Tensor,
        teacher: Teacher | None,
        direction: Direction | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = torch.zeros(4, len(labels), dtype=torch.float32, device=hidden.device)
        log_p, divergence, entropy, taught = found
        for part in _parts(len(labels)):
            log = torch.log_softmax(_logits(hidden[part], weight, bias, softcap), -1)
            row = labels[part, None]
            log_p[part] = log.gather(1, row)[:, 0]
            p = log.exp()
            entropy[part] = -_weighted(p, log)
            if teacher is None:
                continue
            log_t = teacher(part)
            taught[part] = log_t.gather(1, row)[:, 0]
            if direction == "forward":
                t = log_t.exp()
                divergence[part] = _weighted(t, log_t.sub_(log))
            elif direction == "reverse":
                divergence[part] = _weighted(p, log.sub_(log_t))
        ctx.save_for_backward(hidden, weight, bias, labels, divergence)
        ctx.softcap, ctx.teacher, ctx.direction = softcap, teacher, direction
        ctx.mark_non_differentiable(entropy, taught)
        return log_p, divergence, entropy, taught

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_log_p, grad_divergence = grads[:2]
        hidden, weight, bias, labels, divergence = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight) if want_weight else None
        grad_bias = torch.zeros_like(bias) if want_bias else None
        for part in _parts(len(labels)):
            logits = _logits(hidden[part], weight, bias, ctx.softcap)
            log = torch.log_softmax(logits, -1)
            p = log.exp()
            ours, theirs = grad_log_p[part, None], grad_divergence[part, None]
            if ctx.direction == "forward":
                grad = (theirs - ours) * p
                grad -= theirs * ctx.teacher(part).exp_()
            elif ctx.direction == "reverse":
                grad = p * ((log.sub_(ctx.teacher(part)) - divergence[part, None]).mul_(theirs) - ours)
            else:
                grad = p.mul_(-ours)
            grad.scatter_add_(1, labels[part, None], ours)
            if ctx.softcap:
                grad *= 1 - (logits / ctx.softcap) ** 2
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden[part])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _parts(length: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, length, CHUNK)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    logits = nn.functional.linear(hidden, weight, bias).float()
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _weighted(p: Tensor, values: Tensor) -> Tensor:
    """Sum of p x values over the last axis, in one pass."""
    return torch.linalg.vecdot(p, values)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Make sure that `Head` gives the model's own logits.

    Raises:
        UnsupportedModelError: it does not; the architecture does something else to its logits.
    """
    own: Any = model
    ids = (
        torch.arange(2, 6, device=next(model.parameters()).device)[None]
        % own.get_input_embeddings().weight.shape[0]
    )
    found = own(input_ids=ids, output_hidden_states=True, use_cache=False)
    ours = Head.of(model).log_probs(found.hidden_states[-1][0])
    theirs = torch.log_softmax(found.logits[0].float(), -1)
    # Half precision leaves a hundredth of the spread; another scale or cap would leave far more.
    if (ours - theirs).norm() > 0.03 * (theirs - theirs.mean()).norm():
        raise UnsupportedModelError(
            f"model: the logits of {type(model).__name__} are not its head's product with the last state, perhaps "
            "scaled or normalised once more; token-level training does not know how to follow them"
        )
