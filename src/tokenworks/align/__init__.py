"""Token-level preference optimisation, as losses that TRL's trainer runs.

from tokenworks.align import TDPO, TokenPreferenceConfig, TokenPreferenceTrainer, load_pairs

trainer = TokenPreferenceTrainer(
    model, method=TDPO(alpha=0.5), args=TokenPreferenceConfig("out"), train_dataset=load_pairs("pairs.jsonl"),
    processing_class=tokenizer,
)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tokenworks.align.cdpo import CDPO
from tokenworks.align.contract import Needs, Outcome, Pairs, PreferenceMethod
from tokenworks.align.data import load_pairs, sentiment_pairs
from tokenworks.align.dpo import DPO
from tokenworks.align.scores import contrastive_scores, guide_rewards
from tokenworks.align.sparsepo import SparsePO, SparseTokenMask
from tokenworks.align.tdpo import TDPO
from tokenworks.align.tgdpo import TGDPO

LATE = ("TokenPreferenceConfig", "TokenPreferenceTrainer")
"""Imported when first asked for: TRL takes seconds, and a loss can do without it."""


def __getattr__(name: str) -> Any:
    if name in LATE:
        return getattr(import_module("tokenworks.align.trainer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CDPO",
    "DPO",
    "TDPO",
    "TGDPO",
    "Needs",
    "Outcome",
    "Pairs",
    "PreferenceMethod",
    "SparsePO",
    "SparseTokenMask",
    "TokenPreferenceConfig",
    "TokenPreferenceTrainer",
    "contrastive_scores",
    "guide_rewards",
    "load_pairs",
    "sentiment_pairs",
]
