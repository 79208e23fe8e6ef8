"""SparsePO: which tokens count, and for what, by sparse masks (arXiv 2410.05102).

TDPO with a weight from 0 upwards on each token, one for the reward and one for the divergence:

    u     = sum m_u log_ratio (chosen) - sum m_u log_ratio (rejected)
    delta = sum m_d KL (rejected) - sum m_d KL (chosen),   KL(reference || policy) over the vocabulary
    loss  = -log sigmoid(beta (u - delta)) + lambda_u |m_u| + lambda_d |m_d|

The masks are learned with the policy, from the reference's states (`SparseTokenMask`; its last step is a ReLU, so
tokens drop out entirely), or given by the data's scores: those of the reference's activations are MaPO
(`align.mapo.activation_scores`).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from tokenworks.align.contract import (
    Needs,
    Outcome,
    Pairs,
    check_not_negative,
    check_positive,
    halves,
    required,
)
from tokenworks.core.errors import InputError

MASKS = ("common", "independent", "scores")
KINDS = ("simple_all", "simple_last", "ml_all", "ml_last", "binary_all", "binary_last")
INITS = ("paper", "ones")
MIXERS = ("learned", "mean")

INNER = 200
"""Units between the two layers of a head of kind "ml"; there is no function between the layers."""


class SparseTokenMask(nn.Module):
    """m_t = ReLU(sum_l v_l ReLU(w_l . LayerNorm(H_l,t) + b_l)), from the states of L layers.

    Args:
        layers: L. hidden_size: d.
        init: "paper" draws weights as Transformers does, N(0, 0.02), so that masks begin near 0.05, beta must be
            large (the authors take 0.8), and a draw whose v is negative throughout is dead; "ones" begins with
            m = 1 everywhere, that is, with TDPO1.
        dropout: of both ReLUs' results.
        mixer: "learned" is v of the authors' code; "mean" takes the mean over layers, v = 1/L, and cannot be dead.
        kind: "simple_all" as above. "..._last" has one head, on the last layer's states as they are, and no
            mixer. "ml_..." has heads of two layers. "binary_..." takes the sign of the result: an ablation, whose
            mask passes no gradient on and stays what it began as.

    Raises:
        InputError: no such beginning, mixer or kind, or a number out of range.
    """

    def __init__(
        self,
        layers: int,
        hidden_size: int,
        init: str = "paper",
        dropout: float = 0.01,
        mixer: str = "learned",
        kind: str = "simple_all",
    ) -> None:
        super().__init__()
        if layers < 1 or hidden_size < 1:
            raise InputError(
                "layers, hidden_size: a learned mask needs the reference's; take them from its config"
            )
        for name, value, known in (("init", init, INITS), ("mixer", mixer, MIXERS), ("kind", kind, KINDS)):
            if value not in known:
                raise InputError(f"{name}: no {value!r}; there are {', '.join(known)}")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout: {dropout} is not in [0, 1)")
        self.binary, self.last = kind.startswith("binary"), kind.endswith("_last")
        heads, width = 1 if self.last else layers, hidden_size
        self.norm = nn.Identity() if self.last else nn.LayerNorm(hidden_size)
        self.inner = None
        if kind.startswith("ml"):
            self.inner, width = nn.Parameter(torch.empty(heads, INNER, hidden_size)), INNER
            self.inner_bias = nn.Parameter(torch.zeros(heads, INNER))
            nn.init.normal_(self.inner, std=0.02)
        self.weight = nn.Parameter(torch.empty(heads, width))
        self.bias = nn.Parameter(torch.zeros(heads))
        self.mixer: Tensor
        mixed, mix = mixer == "learned" and not self.last, torch.full((heads,), 1 / heads)
        if mixed:
            self.mixer = nn.Parameter(mix)
        else:
            self.register_buffer("mixer", mix)  # whoever thaws the method's parameters leaves it alone
        self.dropout = nn.Dropout(dropout)
        if init == "ones":
            nn.init.zeros_(self.weight)
            nn.init.ones_(self.bias)
        else:
            nn.init.normal_(self.weight, std=0.02)
            if mixed:
                nn.init.normal_(self.mixer, std=0.02)

    def forward(self, states: Tensor) -> Tensor:
        """Float [...], 0 or more, of states [..., L, d]."""
        used = self.norm((states[..., -1:, :] if self.last else states).to(self.weight.dtype))
        if self.inner is not None:
            used = self.dropout(torch.einsum("...ld,lid->...li", used, self.inner) + self.inner_bias)
        heads = torch.relu((used * self.weight).sum(-1) + self.bias)
        mask = heads[..., 0] if self.last else torch.relu(self.dropout(heads) @ self.mixer)
        mask = self.dropout(mask)
        return torch.sign(mask) if self.binary else mask


class SparsePO(nn.Module):
    """The loss, with its masks.

    Args:
        mask: "common" learns one mask for both terms, "independent" one for each, "scores" takes both from the
            data.
        layers, hidden_size: of the reference, for learned masks.
        beta: above 0.
        l1_u, l1_d: lambda_u and lambda_d, from 0 upwards; sums over a pair's tokens are penalised, not means. A
            common mask pays both (the authors' code halves them then).
        init, dropout, mixer, kind: of learned masks (`SparseTokenMask`).

    Raises:
        InputError: a number out of range, no such mask, or learned masks without the reference's shape.
    """

    def __init__(
        self,
        mask: str = "independent",
        layers: int = 0,
        hidden_size: int = 0,
        beta: float = 0.1,
        l1_u: float = 0.0,
        l1_d: float = 0.0,
        init: str = "paper",
        dropout: float = 0.01,
        mixer: str = "learned",
        kind: str = "simple_all",
    ) -> None:
        super().__init__()
        check_positive(beta=beta)
        check_not_negative(l1_u=l1_u, l1_d=l1_d)
        if mask not in MASKS:
            raise InputError(f"mask: no {mask!r}; there are {', '.join(MASKS)}")
        learned = mask != "scores"
        self.mask, self.beta, self.l1_u, self.l1_d = mask, beta, l1_u, l1_d
        self.needs = Needs(
            divergence=True,
            scores="" if learned else "masks, from 0 upwards (such as align.mapo.activation_scores)",
            states=learned,
        )
        shape = (layers, hidden_size, init, dropout, mixer, kind)
        self.mask_u = SparseTokenMask(*shape) if learned else None
        self.mask_d = SparseTokenMask(*shape) if mask == "independent" else None

    def masks(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """m_u and m_d: float32 [2B, T] each, 0 outside the responses."""
        if self.mask_u is None:
            scores = required(pairs.scores, "scores")
            if bool((scores < 0).any()):
                raise InputError("scores: a negative mask; masks are 0 or more")
            found = torch.where(pairs.mask, scores, 0.0)
            return found, found
        states = required(pairs.states, "states").detach()
        m_u = torch.where(pairs.mask, self.mask_u(states), 0.0)
        return m_u, m_u if self.mask_d is None else torch.where(pairs.mask, self.mask_d(states), 0.0)

    def forward(self, pairs: Pairs) -> Outcome:
        divergence = required(pairs.divergence, "divergence")
        m_u, m_d = self.masks(pairs)
        u_w, u_l = halves((m_u * pairs.log_ratio).sum(1))
        d_w, d_l = halves((m_d * divergence).sum(1))
        loss = -logsigmoid(self.beta * ((u_w - u_l) - (d_l - d_w)))
        for weight, mask in ((self.l1_u, m_u), (self.l1_d, m_d)):
            if weight:
                loss = loss + weight * sum(halves(mask.sum(1)))
        rewards = self.beta * (m_u * pairs.log_ratio + m_d * divergence).detach()
        if not m_u.any():
            warnings.warn(
                "the reward mask is 0 at every token of a batch, so that nothing is learned from it; draw the "
                'masks anew with another seed, or begin with init="ones"',
                stacklevel=2,
            )
        return Outcome(
            loss,
            rewards.sum(1),
            {"reward mask": m_u.detach(), "divergence mask": m_d.detach(), "reward": rewards},
            {
                "reward mask": "how much the token's log-ratio counts; 0 leaves it out",
                "divergence mask": "how much the token's divergence counts; 0 lets the policy go",
                "reward": "beta (m_u log ratio + m_d KL) of the token",
            },
            _sparsity(pairs.mask, m_u.detach(), m_d.detach()),
        )


def _sparsity(inside: Tensor, m_u: Tensor, m_d: Tensor) -> dict[str, float]:
    """Shares of response tokens whose mask is 0: of both masks, over all and by side."""
    shares: dict[str, float] = {}
    for name, mask in (("reward", m_u), ("divergence", m_d)):
        zero = (mask == 0) & inside
        sides = {"": (zero, inside)} | {
            f"/{side}": both
            for side, *both in zip(("chosen", "rejected"), halves(zero), halves(inside), strict=True)
        }
        shares |= {f"sparsity/{name}{side}": float(z.sum() / n.sum()) for side, (z, n) in sides.items()}
    return shares
