"""Drafters, verifiers and the papers that pair them, by name.

decoder(session, "spectr")                                        # as the paper pairs them
decoder(session, draft="rsd-s", verify="token-matching")          # any pair that is lossless
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tokenworks.core.errors import InputError
from tokenworks.core.models import load
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Session
from tokenworks.decode.contract import Autoregressive, Drafter, Law, TokenMatching, Verifier
from tokenworks.decode.distil import CONFIG, load_draft
from tokenworks.decode.draft_model import DraftModel
from tokenworks.decode.dyspec import DynamicTree
from tokenworks.decode.ppd_training import load_prompt_tokens
from tokenworks.decode.rsd import ConstantBranching, RecursiveRejection, StochasticBeam
from tokenworks.decode.spectr import IndependentDrafts, KSequential
from tokenworks.decode.speculative import SpeculativeDecoder
from tokenworks.decode.speculative_sampling import DraftChain, SpeculativeSampling
from tokenworks.decode.token_recycling import TokenRecycling, machine_tree

UNAIDED: dict[str, Callable[[Session], Drafter]] = {
    "autoregressive": lambda session: Autoregressive(),
    "token-recycling": lambda session: TokenRecycling(
        session.vocab_size, machine_tree(session), seed_from_prompt=True
    ),
    "prompt-tokens": lambda session: load_prompt_tokens(session.model).drafter(session),
}
"""Drafters that need no draft model, at their best settings for this machine."""

AIDED: dict[str, Callable[[DraftModel], Drafter]] = {
    "draft-chain": DraftChain,
    "independent-drafts": IndependentDrafts,
    "rsd-c": ConstantBranching,
    "rsd-s": StochasticBeam,
    "dyspec": DynamicTree,
    "dyspec-threshold": lambda model: DynamicTree(model, threshold=0.05),
    "dyspec-best": lambda model: DynamicTree(model, children="best"),
}
"""Drafters with a draft model."""

DRAFTERS = (*UNAIDED, *AIDED)

VERIFIERS: dict[str, Verifier] = {
    verifier.name: verifier
    for verifier in (
        TokenMatching(),
        SpeculativeSampling(),
        KSequential(),
        RecursiveRejection(),
        RecursiveRejection(replacement=True),
    )
}

VERIFIER_OF = {
    Law.FIXED: "token-matching",
    Law.SINGLE: "speculative-sampling",
    Law.INDEPENDENT: "k-seq",
    Law.WITHOUT_REPLACEMENT: "recursive-rejection",
}
"""The verifier made for each way of drawing; it accepts more than token matching, which fits them all."""

METHODS = {
    "autoregressive": "autoregressive",
    "token-recycling": "token-recycling",
    "ppd": "prompt-tokens",
    "speculative-sampling": "draft-chain",
    "spectr": "independent-drafts",
    "rsd": "rsd-s",
    "dyspec": "dyspec",
}
"""The drafter of each method; its verifier is the one made for the drafter."""


def decoder(
    session: Session,
    method: str = "token-recycling",
    sampling: Sampling | None = None,
    *,
    draft: str | None = None,
    verify: str | None = None,
    draft_model: DraftModel | None = None,
) -> SpeculativeDecoder:
    """The decoder of a method, or of any drafter with any verifier that is exact for it.

    Args:
        method: one of `METHODS`; names the drafter if `draft` does not.
        draft: one of `DRAFTERS`.
        verify: one of `VERIFIERS`; by default the one made for the drafter.
        draft_model: for the drafters of `AIDED`; by default the one that comes with tokenworks.

    Raises:
        InputError: no such method, drafter or verifier; a pair that would not be lossless; or no draft model for
            this target.
    """
    check_names(method, draft, verify)
    name = draft or METHODS[method]
    if name in UNAIDED:
        drafter = UNAIDED[name](session)
    else:
        drafter = AIDED[name](draft_model or load_draft(session.model, session.vocab_size))
    return SpeculativeDecoder(session, drafter, VERIFIERS[verify or VERIFIER_OF[drafter.law]], sampling)


def check_names(method: str, draft: str | None = None, verify: str | None = None) -> None:
    """Raise `InputError` for a name that `decoder` does not know, before anything is loaded."""
    if method not in METHODS:
        raise InputError(f"method: no decoder {method!r}; there are {', '.join(METHODS)}")
    if draft is not None and draft not in DRAFTERS:
        raise InputError(f"draft: no drafter {draft!r}; there are {', '.join(DRAFTERS)}")
    if verify is not None and verify not in VERIFIERS:
        raise InputError(f"verify: no verifier {verify!r}; there are {', '.join(VERIFIERS)}")


def open_draft(session: Session, tokenizer: PreTrainedTokenizerBase, name: str) -> DraftModel:
    """The user's own draft model.

    Args:
        session: of the target, whose tokenizer is `tokenizer`.
        name: a folder that `tokenworks train draft` wrote, or any model that `load` takes.

    Raises:
        InputError: its tokenizer is not the target's.
    """
    if (Path(name) / CONFIG).exists():
        return load_draft(session.model, session.vocab_size, Path(name))
    found = load(name)
    if found.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"draft-model: {name} has another tokenizer than the target, and a draft model must share it. "
            "To distil one from the target itself: tokenworks train draft"
        )
    return DraftModel(Session(found.model), session.vocab_size)
