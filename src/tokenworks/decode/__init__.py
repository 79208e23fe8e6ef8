"""Decoders: how the next token is chosen.

from tokenworks.core.models import load
from tokenworks.core.session import Session
from tokenworks.decode import decoder

loaded = load("smollm2-135m")
generation = decoder(Session(loaded.model), "token-recycling").generate(prompt_ids, max_new_tokens=64)
"""

from __future__ import annotations

from collections.abc import Callable

from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Session
from tokenworks.decode.contract import Autoregressive, Draft, Drafter, Law, TokenMatching, Verdict, Verifier
from tokenworks.decode.speculative import Generation, SpeculativeDecoder
from tokenworks.decode.token_recycling import TokenRecycling, machine_tree

__all__ = [
    "METHODS",
    "Autoregressive",
    "Draft",
    "Drafter",
    "Generation",
    "Law",
    "SpeculativeDecoder",
    "TokenMatching",
    "TokenRecycling",
    "Verdict",
    "Verifier",
    "decoder",
]

METHODS: dict[str, Callable[[Session], Drafter]] = {
    Autoregressive.name: lambda session: Autoregressive(),
    TokenRecycling.name: lambda session: TokenRecycling(
        session.vocab_size, machine_tree(session), seed_from_prompt=True
    ),
}
"""Decoding methods by slug: each makes the drafter for a session, at its best settings for this machine."""


def decoder(
    session: Session, method: str = TokenRecycling.name, sampling: Sampling | None = None
) -> SpeculativeDecoder:
    """The decoder that a slug of `METHODS` names.

    Raises:
        InputError: no such method.
    """
    if method not in METHODS:
        raise InputError(f"method: no decoder {method!r}; there are {', '.join(METHODS)}")
    return SpeculativeDecoder(session, METHODS[method](session), sampling=sampling)
