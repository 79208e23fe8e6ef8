"""Decoders: how the next token is chosen.

from tokenworks.core.models import load
from tokenworks.core.session import Session
from tokenworks.decode import decoder

loaded = load("smollm2-135m")
generation = decoder(Session(loaded.model), "token-recycling").generate(prompt_ids, max_new_tokens=64)
"""

from __future__ import annotations

from tokenworks.decode.contract import Autoregressive, Draft, Drafter, Law, TokenMatching, Verdict, Verifier
from tokenworks.decode.draft_model import DraftModel
from tokenworks.decode.dyspec import DynamicTree
from tokenworks.decode.registry import DRAFTERS, METHODS, VERIFIERS, check_names, decoder, open_draft
from tokenworks.decode.rsd import ConstantBranching, RecursiveRejection, StochasticBeam
from tokenworks.decode.spectr import IndependentDrafts, KSequential
from tokenworks.decode.speculative import Generation, SpeculativeDecoder
from tokenworks.decode.speculative_sampling import DraftChain, SpeculativeSampling
from tokenworks.decode.token_recycling import TokenRecycling

__all__ = [
    "DRAFTERS",
    "METHODS",
    "VERIFIERS",
    "Autoregressive",
    "ConstantBranching",
    "Draft",
    "DraftChain",
    "DraftModel",
    "Drafter",
    "DynamicTree",
    "Generation",
    "IndependentDrafts",
    "KSequential",
    "Law",
    "RecursiveRejection",
    "SpeculativeDecoder",
    "SpeculativeSampling",
    "StochasticBeam",
    "TokenMatching",
    "TokenRecycling",
    "Verdict",
    "Verifier",
    "check_names",
    "decoder",
    "open_draft",
]
