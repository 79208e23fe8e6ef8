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

LATE = {
    "AlignDistilConfig": "aligndistil_trainer",
    "AlignDistilTrainer": "aligndistil_trainer",
    "RTOConfig": "rto_trainer",
    "RTOTrainer": "rto_trainer",
    "TokenPreferenceConfig": "trainer",
    "TokenPreferenceTrainer": "trainer",
    "train_reverse_dpo": "aligndistil_trainer",
}
"""Imported from their modules when first asked for: TRL takes seconds, and a loss can do without it."""


def __getattr__(name: str) -> Any:
    if name in LATE:
        return getattr(import_module(f"tokenworks.align.{LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CDPO",
    "DPO",
    "TDPO",
    "TGDPO",
    "AlignDistilConfig",
    "AlignDistilTrainer",
    "Needs",
    "Outcome",
    "Pairs",
    "PreferenceMethod",
    "RTOConfig",
    "RTOTrainer",
    "SparsePO",
    "SparseTokenMask",
    "TokenPreferenceConfig",
    "TokenPreferenceTrainer",
    "contrastive_scores",
    "guide_rewards",
    "load_pairs",
    "sentiment_pairs",
    "train_reverse_dpo",
]
