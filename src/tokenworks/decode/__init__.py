"""Decoders: how the next token is chosen.

from tokenworks.core.models import load
from tokenworks.core.session import Session
from tokenworks.decode import decoder

loaded = load("smollm2-135m")
generation = decoder(Session(loaded.model), "token-recycling").generate(prompt_ids, max_new_tokens=64)
"""

from __future__ import annotations

from tokenworks.decode.adadec import AdaDec
from tokenworks.decode.awrs import SAMPLERS
from tokenworks.decode.beam import BeamSearch
from tokenworks.decode.byte_level import ByteEnsemble, ByteLM
from tokenworks.decode.constraint import FunctionConstraint, grammar, json_schema, regex
from tokenworks.decode.contract import Autoregressive, Draft, Drafter, Law, TokenMatching, Verdict, Verifier
from tokenworks.decode.draft_model import DraftModel
from tokenworks.decode.dyspec import DynamicTree
from tokenworks.decode.r2r import RoutedDecoder
from tokenworks.decode.registry import DRAFTERS, METHODS, VERIFIERS, check_names, decoder, open_draft
from tokenworks.decode.rsd import ConstantBranching, RecursiveRejection, StochasticBeam
from tokenworks.decode.smc import SMC
from tokenworks.decode.spectr import IndependentDrafts, KSequential
from tokenworks.decode.speculative import Generation, SpeculativeDecoder
from tokenworks.decode.speculative_sampling import DraftChain, SpeculativeSampling
from tokenworks.decode.token_recycling import TokenRecycling

__all__ = [
    "DRAFTERS",
    "METHODS",
    "SAMPLERS",
    "SMC",
    "VERIFIERS",
    "AdaDec",
    "Autoregressive",
    "BeamSearch",
    "ByteEnsemble",
    "ByteLM",
    "ConstantBranching",
    "Draft",
    "DraftChain",
    "DraftModel",
    "Drafter",
    "DynamicTree",
    "FunctionConstraint",
    "Generation",
    "IndependentDrafts",
    "KSequential",
    "Law",
    "RecursiveRejection",
    "RoutedDecoder",
    "SpeculativeDecoder",
    "SpeculativeSampling",
    "StochasticBeam",
    "TokenMatching",
    "TokenRecycling",
    "Verdict",
    "Verifier",
    "check_names",
    "decoder",
    "grammar",
    "json_schema",
    "open_draft",
    "regex",
]
